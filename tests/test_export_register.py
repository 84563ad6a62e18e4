"""`import moect` is cheap, and transformers knows exported models whichever of the two is imported first."""

import pytest
from export_helpers import exported, extended, python

import moect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(extended("llama"), tmp_path_factory.mktemp("register") / "export")


def test_importing_moect_loads_neither_torch_nor_transformers(tmp_path):
    code = "import sys, moect; print(moect.__version__, [m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(code, cwd=tmp_path) == f"{moect.__version__} []"


def test_the_config_alone_is_known_too(folder, tmp_path):
    code = (
        "import sys, moect\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "print(type(config).__module__, config.base_config.model_type)"
    )
    assert python(code, folder, cwd=tmp_path) == "moect.model.configuration_moect llama"


@pytest.mark.parametrize(
    "imports",
    [
        "import moect\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport moect",
        "import transformers\nimport moect\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoConfig\nimport moect\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["moect-first", "transformers-first", "transformers-not-yet-used", "between-config-and-model"],
)
def test_models_load_whichever_is_imported_first(imports, folder, tmp_path):
    code = f"{imports}\nimport sys\nprint(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)"
    assert python(code, folder, cwd=tmp_path) == "moect.model.modeling_moect"


def test_public_names_are_reachable_from_the_package():
    from moect.model.append import append_moe

    assert moect.append_moe is append_moe
    with pytest.raises(AttributeError, match="no attribute 'apend_moe'"):
        moect.apend_moe  # noqa: B018
