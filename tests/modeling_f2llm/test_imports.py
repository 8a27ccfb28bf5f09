"""What importing the package costs: nothing heavy until a name that needs it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_imports

import modeling_f2llm

_HEAVY = (
    "import sys; print(*(name for name in ('torch', 'transformers', 'sentence_transformers') if name in sys.modules))"
)


def imported_by(statement):
    command = [sys.executable, "-c", f"{statement}; {_HEAVY}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import modeling_f2llm",
        "from modeling_f2llm import instruct",
        "from modeling_f2llm.prompts import DEFAULT_PROMPTS",
        "from training.data.preparation import plan, reading, tokenising",
        "from training.data.survey import survey",
    ],
)
def test_prompts_and_data_work_import_nothing_heavy(statement):
    assert imported_by(statement) == []


def test_every_public_name_is_there():
    assert set(modeling_f2llm.__all__) <= set(dir(modeling_f2llm))
    for name in modeling_f2llm.__all__:
        assert getattr(modeling_f2llm, name) is not None
    assert modeling_f2llm.F2LLMModel.__module__ == "modeling_f2llm.modeling_f2llm"


def test_other_names_are_refused_as_usual():
    with pytest.raises(AttributeError, match="has no attribute 'F2LLMModels'"):
        _ = modeling_f2llm.F2LLMModels
    with pytest.raises(ImportError):
        from modeling_f2llm import nothing  # noqa: F401


def test_remote_code_asks_for_no_package_that_is_optional(released_folder):
    # What transformers looks for before it runs code from the Hub: imports in functions count, those in a try do not.
    files = list(released_folder.glob("*.py"))
    assert files
    wanted = {name for file in files for name in get_imports(file)}
    assert wanted - sys.stdlib_module_names <= {"torch", "transformers", "huggingface_hub"}
