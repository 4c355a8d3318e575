"""What `import jdrop` gives: the public names, each at its first use."""

import importlib.metadata
import pydoc
import subprocess
import sys

import pytest

import jdrop

FUNCTIONS = {
    "apply_mask",
    "compare",
    "dot_product_attention",
    "dropout",
    "keep_mask",
    "scale_weights",
}


def test_dir_lists_the_public_names_and_nothing_else():
    assert {name for name in dir(jdrop) if not name.startswith("_")} == set(jdrop.__all__)
    assert set(jdrop.__all__) >= FUNCTIONS
    for name in dir(jdrop):
        assert getattr(jdrop, name) is not None


def test_help_documents_every_function():
    text = pydoc.plain(pydoc.render_doc(jdrop))
    assert all(f"{name}(" in text for name in FUNCTIONS)
    assert "TYPE_CHECKING" not in text


def test_the_version_is_that_of_the_distribution():
    assert jdrop.__version__ == importlib.metadata.version("jdrop")


def test_an_unknown_name_raises():
    with pytest.raises(AttributeError, match="module 'jdrop' has no attribute 'dropuot'"):
        jdrop.dropuot  # noqa: B018


def test_without_the_packages_of_the_study_help_works_and_compare_says_what_to_install():
    program = (
        "import sys\n"
        "for name in ('matplotlib', 'pydantic', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import jdrop, pydoc\n"
        "assert 'dropout(' in pydoc.plain(pydoc.render_doc(jdrop))\n"
        "try:\n"
        "    from jdrop import compare\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'jdrop[study]'" in result.stdout, result.stdout + result.stderr


def test_without_the_packages_of_the_study_the_command_says_what_to_install():
    program = (
        "import sys\nsys.modules['click'] = None\nfrom jdrop.study import main\nsys.exit(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'jdrop[study]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
