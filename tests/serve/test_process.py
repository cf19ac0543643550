"""The process: what it prints, how it is told to end, TLS, and a real model behind the verb's own composition."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jax
import pytest
from infer.foreseeing import DEEPSEEK
from talker import Talker
from tiny import LLAMA, random_params

import jaxformers
from jaxformers import serving
from jaxformers.api import Model, save_pretrained
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.infer.request import EngineConfig
from jaxformers.parallel.mesh import single_device_mesh


@pytest.fixture
def process(tmp_path):
    """`process(drain_seconds)`: a server of its own, and its address once it is ready."""
    started = []

    def start(drain_seconds):
        command = [sys.executable, Path(__file__).with_name("process.py"), tmp_path / "t", str(drain_seconds)]
        (tmp_path / "t").mkdir()
        where = {"PYTHONPATH": str(Path(jaxformers.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(command, env=os.environ | where, text=True, **pipes)
        started.append(child)
        first, second = child.stdout.readline(), child.stdout.readline()
        assert second == "ready\n", child.stderr.read()
        assert first.startswith("standin listens at http://127.0.0.1:")
        return child, first.split()[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


class Streaming(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url, **body):
        super().__init__(daemon=True)
        self.url, self.body, self.text, self.begun = url, body, "", threading.Event()
        self.start()

    def run(self):
        with httpx.stream("POST", f"{self.url}/v1/completions", json={**self.body, "stream": True}, timeout=60) as r:
            for part in r.iter_text():
                self.text += part
                self.begun.set()


def test_told_to_end_it_finishes_what_it_has_begun_and_takes_nothing_new(process):
    child, url = process(10)
    reader = Streaming(url, prompt="say all of this is still said", max_tokens=100)
    assert reader.begun.wait(30)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
    reader.join(30)
    pieces = [json.loads(line[6:]) for line in reader.text.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "all of this is still said"
    assert child.wait(30) == 0
    log = [json.loads(line) for line in child.stderr.read().splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in log] == [("/v1/completions", 200)]


def test_what_does_not_finish_in_time_is_told_so(process):
    child, url = process(0.3)
    reader = Streaming(url, prompt="endless", max_tokens=400)
    assert reader.begun.wait(30)
    child.send_signal(signal.SIGTERM)
    reader.join(30)
    assert "the server is shutting down" in reader.text
    assert reader.text.endswith("data: [DONE]\n\n")
    assert child.wait(30) == 0


@pytest.fixture(scope="module")
def model():
    cfg = read_config(LLAMA | {"num_hidden_layers": 1})
    return Model(cfg, jax.device_put(random_params(cfg)), byte_tokenizer(), single_device_mesh())


@pytest.fixture
def composed(monkeypatch):
    """What the verb would have served, by name, once it was called."""
    seen = {}

    def make_engine(loaded, config, draft):
        seen["config"], seen["model"] = config, loaded
        return Talker(max_length=config.max_length, vocab_size=loaded.config.vocab_size)

    def run(served, options, listener):
        listener.close()
        seen["served"], seen["options"] = served, options

    monkeypatch.setattr(serving, "make_engine", make_engine)
    monkeypatch.setattr(serving, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return seen


def test_the_verb_loads_a_model_and_serves_it_under_its_own_name(model, tmp_path, command, composed):
    save_pretrained(model, tmp_path / "tiny-model")
    extra = ("--api-key", "k", "--speculate", "ngram", "--draft-tokens", 2)
    outcome = command("serve", tmp_path / "tiny-model", "--port", 0, "--slots", 3, "--max-length", 48, *extra)
    assert outcome.code == 0, outcome
    assert composed["config"] == EngineConfig(slots=3, max_length=48, speculate="ngram", draft_tokens=2)
    served = composed["served"]
    assert (served.name, served.max_length, served.vocab_size, served.family) == ("tiny-model", 48, 300, "llama")
    assert composed["options"].settings.access.keys == ("k",)
    assert served.pooling == "mean"


@pytest.mark.parametrize("extra, modules", [((), 0), (("--speculate", "mtp"), 1)])
def test_the_verb_takes_a_models_modules_along_where_they_are_to_guess(extra, modules, tmp_path, command, composed):
    cfg = read_config(DEEPSEEK | {"vocab_size": 300})
    whole = Model(cfg, jax.device_put(random_params(cfg)), byte_tokenizer(), single_device_mesh())
    save_pretrained(whole, tmp_path)
    assert command("serve", tmp_path, "--port", 0, *extra).code == 0
    assert composed["config"].speculate == ("mtp" if modules else None)
    assert composed["model"].config.mtp_modules == len(composed["model"].params.get("mtp", ())) == modules


def test_the_verb_serves_a_real_model_until_it_is_told_to_end_and_ends_what_it_has_begun(model, tmp_path):
    save_pretrained(model, tmp_path / "tiny-model")
    command = [sys.executable, "-m", "jaxformers", "serve", tmp_path / "tiny-model", "--port", "0", "--slots", "2"]
    where = {"PYTHONPATH": str(Path(jaxformers.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, env=os.environ | where, text=True, **pipes)
    try:
        url = child.stdout.readline().split()[-1]
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        reader = Streaming(url, prompt="endless", max_tokens=56, ignore_eos=True, seed=1)
        assert reader.begun.wait(30)
        child.send_signal(signal.SIGTERM)
        reader.join(30)
        assert child.wait(30) == 0
        assert '"finish_reason":"length"' in reader.text
        assert reader.text.endswith("data: [DONE]\n\n")
        assert "Traceback" not in child.stderr.read()
    finally:
        child.kill()
        child.communicate()


def test_mistakes_are_told_before_a_model_is_loaded(command, tmp_path, serve):
    taken = serve().port
    assert f"port {taken}: Address already in use" in command("serve", tmp_path, "--port", taken).mistake
    assert "needs its certificate" in command("serve", tmp_path, "--tls-key", __file__).mistake
    key_file = tmp_path / "keys"
    key_file.write_text("two words\n")
    assert "printable ASCII" in command("serve", tmp_path, "--api-key-file", key_file).mistake


def test_over_tls_clients_speak_https(tmp_path, serve):
    files = certificate, private_key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -out cert.pem -keyout key.pem"
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    live = serve(address=serving.Address(port=0, certificate=certificate, private_key=private_key))
    assert all(path.is_file() for path in files)
    answer = live.client.post(f"{live.url}/v1/completions", json={"prompt": "say safe"})
    assert live.url.startswith("https://")
    assert answer.json()["choices"][0]["text"] == "safe"
    with pytest.raises(httpx.TransportError):
        httpx.get(live.url.replace("https", "http"))
