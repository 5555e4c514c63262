"""`distattn serve`: over HTTP models write what `generate` writes, whole and as a stream, alone and in a batch."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from distattn_hf import AttentionSpec, DistAttnConfig, convert
from distattn_hf.core.modeling_distattn import DistAttnForCausalLM
from tests.fixtures.load import gpt2_english
from tests.test_cli import distattn

PROMPTS = ["In the beginning God created", "And it came to pass", "Blessed are the poor in spirit: for theirs is the"]
LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    teacher, tokenizer, _ = gpt2_english()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    native = DistAttnConfig(
        mechanism="l1", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
        intermediate_size=64, is_decoder=True, initializer_range=0.5,
    )  # fmt: skip
    student = convert(teacher, AttentionSpec("l2", softening=1.0), init="plain")
    models = {
        "l2": student,
        "retrieval": convert(teacher, AttentionSpec(mechanism="retrieval", window_size=4, block_size=2, num_blocks=1)),
        "native": DistAttnForCausalLM(native),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    teacher.save_pretrained(folder / "teacher")
    convert(AutoModelForCausalLM.from_pretrained(folder / "teacher"), "cosine", init="plain").save_adapter(
        folder / "adapter"
    )
    tokenizer.save_pretrained(folder / "adapter")
    return folder


@contextmanager
def served(folder, *options):
    """A client of a server of its own process, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "distattn_hf.cli",
        "serve",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with subprocess.Popen(
        [*command, "--device", "cpu", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except URLError:
                    assert process.poll() is None, process.stdout.read()[-3000:]
                    time.sleep(0.2)
            else:
                raise AssertionError("the server does not answer")
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        finally:
            # An interrupt would leave transformers' own thread of continuous batching running.
            process.kill()


def texts(folder) -> list[str]:
    """What `generate` writes after each prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    results = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)
        results.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return results


def chat(client, folder, prompt, **options):
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=str(folder), messages=messages, max_tokens=LENGTH, **options)


def check(client, folder):
    expected = texts(folder)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert chat(client, folder, prompt).choices[0].message.content == text
        parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, folder, prompt, stream=True)]
        assert len(parts) > 2
        assert "".join(parts) == text
    completion = client.completions.create(model=str(folder), prompt=PROMPTS[0], max_tokens=LENGTH)
    assert completion.choices[0].text == expected[0]
    return expected


@pytest.mark.parametrize("name", ["l2", "retrieval", "native", "adapter"])
def test_texts_are_those_of_generate(folders, name):
    with served(folders / name) as client:
        found = check(client, folders / name)
    assert found != texts(folders / "l2") or name == "l2"


def test_continuous_batching(folders):
    expected = texts(folders / "l2")
    with served(folders / "l2", "--continuous-batching", "--cb-num-blocks", "64") as client:
        check(client, folders / "l2")
        # All at once share a batch.
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda prompt: chat(client, folders / "l2", prompt), PROMPTS * 2))
        response = client.responses.create(
            model=str(folders / "l2"), input=PROMPTS[1], max_output_tokens=LENGTH, stream=False
        )
    assert [answer.choices[0].message.content for answer in answers] == expected * 2
    assert response.output_text == expected[1]


def test_what_has_no_paged_form_is_refused_before_the_server_starts(folders):
    run = distattn("serve", folders / "retrieval", "--continuous-batching", check=False)
    assert run.returncode == 1
    assert "continuous batching has no form for mechanism='retrieval'" in run.stderr


def test_without_a_web_server(folders, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    run = distattn("serve", folders / "l2", check=False)
    assert run.returncode == 1
    assert "pip install 'distattn_hf[serve]'" in run.stderr
