"""Who may ask: every route, with and without a key, and where a server may listen."""

import base64

import pytest

from jaxformers.serve.security import check_exposure, is_loopback, read_keys
from jaxformers.serve.served import Access, Settings
from jaxformers.serving import Address, hosts_to_answer

KEY = "sk-one"
OPEN = {"/health"}


@pytest.fixture(scope="module")
def locked(serve):
    return serve(settings=Settings(access=Access(keys=(KEY, "sk-two"))), wait=False)


def every_route(live):
    """Method and path of each route that the application has."""
    routes = live.server.config.app.routes
    return [(method, route.path) for route in routes for method in sorted(route.methods)]


def test_every_route_but_health_asks_for_a_key(locked):
    routes = every_route(locked)
    assert len(routes) >= 12
    bad = ["", "Bearer", "Bearer sk-on", "Bearer sk-one2", "Basic !!", "Basic aGk=", "bearer\tsk", KEY]
    for method, path in routes:
        for value in bad:
            answer = locked.client.request(
                method, f"{locked.url}{path}", headers={"Authorization": value} if value else {}
            )
            assert (answer.status_code == 401) == (path not in OPEN), (method, path, value)
            if path not in OPEN and method != "HEAD":
                assert answer.json()["error"]["type"] == "invalid_request_error"


def test_paths_that_do_not_exist_ask_for_a_key_too(locked):
    for path in (
        "/nowhere",
        "/health/",
        "/health/../metrics",
        "//health",
        "/%68ealth/x",
        "/v1/models/%2e%2e/%2e%2e/health",
    ):
        assert locked.get(path).status_code == 401, path


def test_any_of_the_keys_opens_as_a_token_or_as_a_browsers_password(locked):
    basic = base64.b64encode(b"anyone:sk-two").decode()
    for value in (f"Bearer {KEY}", "bearer sk-two", f"Basic {basic}"):
        assert locked.get("/v1/models", headers={"Authorization": value}).status_code == 200
    assert "Basic" in locked.get("/").headers["www-authenticate"]


def test_keys_come_from_options_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second \n")
    assert read_keys(["zero", "first"], file, "third") == ("zero", "first", "third", "second")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys([], file, None)
    for key in ("", "with space", "naïve"):
        with pytest.raises(ValueError, match="printable ASCII"):
            read_keys([key], None, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.4", "example.org", "127.0.0.1.example.org"])
def test_without_a_key_only_this_machine_is_served(host):
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="no API key is set"):
        check_exposure(host, has_key=False, insecure=False)
    check_exposure(host, has_key=True, insecure=False)
    assert hosts_to_answer(Address(host=host), has_key=False, insecure=True) == ()


def test_the_verb_refuses_to_serve_everyone(command, tmp_path):
    assert "no API key is set" in command("serve", tmp_path, "--host", "0.0.0.0").mistake
    assert "no file" in command("serve", tmp_path, "--tls-certificate", tmp_path / "none.pem").mistake


def test_a_page_of_another_site_reaches_nothing(serve):
    hosts = hosts_to_answer(Address(), has_key=False, insecure=False)
    alone = serve(settings=Settings(access=Access(hosts=hosts)))
    assert alone.get("/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403
    assert alone.get("/v1/models").status_code == 200
    form = alone.client.post(
        f"{alone.url}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert form.status_code == 415
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = alone.client.options(f"{alone.url}/v1/completions", headers=asking)
    assert "access-control-allow-origin" not in answer.headers


def test_pages_of_named_origins_may_ask(serve):
    origin = "https://chat.example"
    open_ = serve(settings=Settings(access=Access(keys=(KEY,), origins=(origin,))), wait=False)
    asking = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = open_.client.options(f"{open_.url}/v1/completions", headers=asking)
    assert answer.headers["access-control-allow-origin"] == origin
    refused = open_.client.get(f"{open_.url}/v1/models", headers={"Origin": "https://other.example"})
    assert refused.status_code == 401
    assert "access-control-allow-origin" not in refused.headers
