"""What importing the package costs: nothing heavy until a name that needs it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_imports

import modeling_f2llm

HEAVY = "('torch', 'transformers', 'sentence_transformers')"


@pytest.mark.parametrize(
    "statement",
    [
        "import modeling_f2llm",
        "from modeling_f2llm import instruct",
        "from modeling_f2llm.prompts import DEFAULT_PROMPTS",
        "from training.data.preparation import plan, reading, writing",
        "from training.data.survey import survey",
    ],
)
def test_prompts_and_data_work_import_nothing_heavy(statement):
    code = f"{statement}; import sys; assert not {{*{HEAVY}}} & {{*sys.modules}}, {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert set(modeling_f2llm.__all__) <= set(dir(modeling_f2llm))
    for name in modeling_f2llm.__all__:
        assert getattr(modeling_f2llm, name) is not None
    assert modeling_f2llm.F2LLMModel.__module__ == "modeling_f2llm.modeling_f2llm"
    with pytest.raises(AttributeError, match="has no attribute 'F2LLMModels'"):
        _ = modeling_f2llm.F2LLMModels


def test_remote_code_asks_for_no_package_that_is_optional(released_folder):
    # What transformers looks for before it runs code from the Hub: imports in functions count, those in a try do not.
    files = list(released_folder.glob("*.py"))
    assert files
    wanted = {name for file in files for name in get_imports(file)}
    assert wanted - sys.stdlib_module_names <= {"torch", "transformers", "huggingface_hub"}
