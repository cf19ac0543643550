"""`bench serve` against a server whose speed is known."""

import json

from talker import Talker


def test_the_figures_are_those_of_the_server(serve, command):
    live = serve(Talker(slots=4, pause=0.02, tokens_a_step=2))
    options = ("--requests", 8, "--concurrency", 4, "--prompt-tokens", 8, "--new-tokens", 20, "--json")
    figures = json.loads(command("bench", "serve", live.url, *options).out)
    assert (figures["requests"], figures["refused"], figures["failed"]) == (8, 0, 0)
    assert figures["new_tokens"] == live.engine.new_tokens
    assert figures["between_tokens"]["median"] >= 0.01 - 1e-3
    assert figures["first_token"]["median"] >= 0.02
    assert figures["tokens_per_second"] <= 4 * 2 / 0.02


def test_refusals_are_counted_apart(serve, command):
    live = serve(Talker(slots=1, queue_requests=1, pause=0.02))
    options = ("--requests", 12, "--concurrency", 6, "--new-tokens", 20, "--json")
    figures = json.loads(command("bench", "serve", live.url, *options).out)
    assert figures["refused"] > 0
    assert figures["failed"] == 0


def test_an_address_without_a_server_is_told(command):
    assert "no server answers" in command("bench", "serve", "http://127.0.0.1:9").mistake
    assert "is no address of a server" in command("bench", "serve", "nowhere").mistake
