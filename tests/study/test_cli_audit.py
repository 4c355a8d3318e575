"""`jdrop audit`: the audit of a model that is named on the command line."""

import pytest

from jdrop.study.cli import run_command

MODELS = """
import flax.linen as nn
from flax import nnx
import jdrop.nnx


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.drop = jdrop.nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Embed(9, 4)(x))
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    (tmp_path / "audited_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_table_and_the_faults_are_printed(capsys):
    assert run_command(["audit", "audited_models:Linen", "--input-shape", "5,7"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "site       kind  rate  shape  broadcast  training  evaluation  key  read by",
        "Dropout_0  Flax  0.5   5x4    -          off       off         -    outputs",
        "",
        "- Never on, since off in training too: Dropout_0.",
    ]


@pytest.mark.parametrize(
    ("model", "options"), [("Nnx", ["3"]), ("Tokens", ["3,8", "--input-dtype", "int32"])]
)
def test_nnx_modules_and_models_of_tokens_are_audited(model, options, capsys):
    assert run_command(["audit", f"audited_models:{model}", "--input-shape", *options]) == 0
    assert capsys.readouterr().out.endswith("\n\nNo faults.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audited_models:Linen"], "Missing option '--input-shape'"),
        (["audited_models:Linen", "--input-shape", "x"], "must be positive integers"),
        (["audited_models:Absent", "--input-shape", "3"], "audited_models has no Absent"),
        (
            ["audited_models:Tokens", "--input-shape", "3,8"],
            "audited_models:Tokens cannot be traced with float32 inputs of shape (3, 8)",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run_command(["audit", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
