"""Uploading an adapter after its base: it loads back by its name alone, and is the same to the last bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.hub_server.client import environment
from tests.training.publishing.hub.test_upload import hold
from tests.training.publishing.packed import BASE, content_of
from training.publish import main

ADAPTER = "org/tiny"
_TEXTS = ["Where do giant pandas live?", "Панды живут в бамбуковых лесах."]
_LOAD = f"""
import sys
import numpy as np
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
texts = {_TEXTS!r}
plain = SentenceTransformer("{ADAPTER}", device="cpu")
code = SentenceTransformer("{ADAPTER}", device="cpu", trust_remote_code=True)
tagged = SentenceTransformer("{ADAPTER}", revision="v1.0", device="cpu")
peft = PeftModel.from_pretrained(AutoModel.from_pretrained("{BASE}"), "{ADAPTER}").eval()
hidden = peft(**plain.tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0, -1]
np.savez(
    sys.argv[1],
    plain=plain.encode(texts), code=code.encode(texts), tagged=tagged.encode(texts),
    peft=(hidden / hidden.norm()).detach().numpy(), kind=type(code.transformers_model).__module__,
)
"""


@pytest.mark.usefixtures("client_waits", "no_figures")
def test_an_adapter_is_pushed_after_its_base_and_loads_back_the_same(
    hub_server, trained_adapter, adapter_base, tmp_path, capsys
):
    packed = tmp_path / "packed"
    words = ["pack", str(trained_adapter), "--name", "tiny", "--output", str(packed), "--licence", "apache-2.0"]
    words += ["--base", BASE]
    assert main(words) == 0
    assert main(["push", str(packed), "--repo", ADAPTER, "--dry-run"]) == 0
    assert main(["push", str(packed), "--repo", ADAPTER]) == 2
    shown = capsys.readouterr().err
    assert f"base is not at {hub_server.address}/{BASE}" in shown and "--no-verify" in shown
    assert not [kind for kind, name in hub_server.store.repositories if name == ADAPTER]

    hold(hub_server, content_of(adapter_base), BASE)
    assert main(["push", str(packed), "--repo", ADAPTER, "--tag", "v1.0"]) == 0
    repository = hub_server.repository(ADAPTER)
    assert content_of(packed).keys() == repository.files().keys()
    assert main(["push", str(packed), "--repo", ADAPTER, "--tag", "v1.0"]) == 0
    assert len(repository.commits) == 2 and "nothing to change" in capsys.readouterr().out

    command = [sys.executable, "-c", _LOAD, str(tmp_path / "loaded.npz")]
    settings = environment(hub_server, tmp_path / "home")
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = np.load(tmp_path / "loaded.npz")
    local = SentenceTransformer(str(trained_adapter / "model"), device="cpu").encode(_TEXTS)
    np.testing.assert_array_equal(loaded["plain"], local)
    np.testing.assert_array_equal(loaded["tagged"], local)
    np.testing.assert_allclose(loaded["code"], local, atol=1e-5)
    np.testing.assert_allclose(loaded["peft"], local[0], atol=1e-6)
    assert "transformers_modules" in str(loaded["kind"])

    # An adapter of another base is another model.
    assert main([*words[:-1], "org/other"]) == 0
    hub_server.store.create("model", "org/other")
    assert main(["push", str(packed), "--repo", ADAPTER]) == 2
    assert "holds another model (tiny" in capsys.readouterr().err
