"""Pages in a real browser that were not asked for: of another site, of another port of this
machine, and of a name that has come to mean this machine. They can start, publish, stop and read
nothing, by whatever a page has for that. A page of a listed origin can do all of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from tests.browser import Browser
from tests.front import Front
from tests.people import Socket
from tests.processes import Server
from tests.raw_socket import dialled
from tests.readers import ask
from tests.tokens import SECRET, token

StartServer = Callable[..., Server]
StartFront = Callable[[str], Awaitable[Front]]
SERVICE = "the-key-of-a-service"

# All that a page can do about a server, each named in the query of what it asks for; gives what it
# could read.
ATTACK = """
const {server, stream} = given, read = {};
document.cookie = given.cookie;  // as a browser has it whose user has been there
const rooms = `${server}/api/v1/rooms/private`, streams = `${server}/api/v1/streams/${stream}`;
const generate = (by) => `${server}/stream?prompt=hello&by=${by}`;
const text = JSON.stringify({
  prompt: "hello", message: "hello", content: "hello", model: "demo",
  messages: [{role: "user", content: "hello"}],
  user: "ann", user_id: "ann", channel: "c", event: "e",
});
const posts = {
  stream: `${server}/stream`, chat: `${server}/api/chat/stream`,
  completions: `${server}/v1/chat/completions`, generate: `${server}/api/v1/generate`,
  publish: `${rooms}/messages`, stop: `${streams}/stop`, tell: `${server}/api/v1/sse/publish`,
  disconnect: `${server}/api/v1/disconnect`, ticket: `${server}/api/v1/tickets`,
};
const gets = {
  history: `${rooms}/messages`, presence: `${rooms}/presence`, rooms: `${server}/api/v1/rooms`,
  status: streams, answer: `${streams}/events`, room: `${rooms}/events`,
  models: `${server}/v1/models`, metrics: `${server}/metrics`, prompt: generate("fetch"),
};
const tagged = (url, by) => `${url}${url.includes("?") ? "&" : "?"}by=${by}`;

// Simple requests: a browser sends them without asking before.
for (const [name, url] of Object.entries(posts)) navigator.sendBeacon(tagged(url, "beacon"), text);
const work = [];
const attempt = (name, doing) => work.push(doing.then(
  (got) => { if (got !== undefined) read[name] = got; }, () => {},
));
const content = async (answer) => (answer.type === "opaque" ? undefined : answer.text());
for (const [name, url] of Object.entries(posts)) {
  const simple = {method: "POST", body: text, credentials: "include"};
  const opaque = fetch(tagged(url, "opaque"), {...simple, mode: "no-cors"});
  attempt(`opaque ${name}`, opaque.then(content));
  attempt(`simple ${name}`, fetch(tagged(url, "simple"), simple).then(content));
  const json = {...simple, headers: {"Content-Type": "application/json", "X-User-Id": "ann"}};
  attempt(`json ${name}`, fetch(tagged(url, "json"), json).then(content));
}
for (const [name, url] of Object.entries(gets)) {
  attempt(`get ${name}`, fetch(tagged(url, "get"), {credentials: "include"}).then(content));
  const opaque = fetch(tagged(url, "opaque-get"), {mode: "no-cors", credentials: "include"});
  attempt(`opaque get ${name}`, opaque.then(content));
}
attempt("delete", fetch(tagged(rooms, "delete"), {method: "DELETE"}).then(content));

// Elements: none of them names the page's origin.
const element = (name, fields) => new Promise((done) => {
  const made = Object.assign(document.createElement(name), fields);
  made.onload = made.onerror = () => done(undefined);
  document.body.append(made);
});
attempt("img", element("img", {src: generate("img")}));
attempt("script", element("script", {src: generate("script")}));
attempt("css", element("link", {rel: "stylesheet", href: generate("css")}));
attempt("iframe", element("iframe", {src: generate("iframe")}));
attempt("silent", element("iframe", {src: generate("silent"), referrerPolicy: "no-referrer"}));

// A frame without an origin, and forms, which go to a frame or to a window.
const inside = `fetch(${JSON.stringify(tagged(posts.publish, "sandbox"))},
  {method: "POST", mode: "no-cors", body: ${JSON.stringify(text)}}).finally(() => {
    const image = new Image();
    image.onload = image.onerror = () => parent.postMessage("sandboxed", "*");
    image.src = ${JSON.stringify(generate("sandbox-img"))};
  })`;
attempt("sandbox", new Promise((done) => {
  addEventListener("message", (e) => e.data === "sandboxed" && done(undefined));
  element("iframe", {sandbox: "allow-scripts", srcdoc: `<script>${inside}</` + "script>"});
}));
const submit = (by, url, fields) => {
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", action: url, ...fields});
  const input = (name, value) => Object.assign(document.createElement("input"), {name, value});
  const body = input(text.slice(0, -1) + ', "x": "', '"}');  // with `=` between: JSON
  form.append(...(fields.method ? [input("prompt", "hello"), input("by", by)] : [body]));
  document.body.append(form);
  const frame = Object.assign(document.createElement("iframe"), {name: by});
  document.body.append(frame);
  return new Promise((done) => {
    frame.onload = () => done(undefined);
    form.target = by;
    form.submit();
  });
};
attempt("form", submit("form", tagged(posts.publish, "form"), {enctype: "text/plain"}));
attempt("form stop", submit("form-stop", tagged(posts.stop, "form"), {}));
attempt("form get", submit("form-get", generate("form-get"), {method: "GET"}));
const opened = async (url) => {
  const popup = window.open(url);
  for (;;) {
    await new Promise((soon) => setTimeout(soon, 20));
    try {
      const {location, document} = popup;
      if (location.href === "about:blank" || document.readyState !== "complete") continue;
      return document.body.innerText;
    } catch {
      return undefined;  // it is there, and not for us to see
    }
  }
};
attempt("window", opened(generate("window")));
attempt("history window", opened(tagged(gets.history, "window")));

// What stays open.
const source = (url) => new Promise((done) => {
  const made = new EventSource(url, {withCredentials: true});
  made.onmessage = made.onopen = (e) => done(`event source ${e.type}`);
  made.onerror = () => made.readyState === EventSource.CLOSED && done(undefined);
});
attempt("event source", source(tagged(gets.room, "source")));
attempt("event source answer", source(tagged(gets.answer, "source")));
attempt("event source prompt", source(generate("source")));
const socket = (path) => new Promise((done) => {
  const made = new WebSocket(server.replace("http", "ws") + path + "?by=socket");
  made.onopen = () => { made.send(text); done(`open ${path}`); };
  made.onclose = () => done(undefined);
});
for (const path of ["/ws/private", "/ws", "/echo"]) attempt(`socket ${path}`, socket(path));
await Promise.race([Promise.all(work), new Promise((late) => setTimeout(late, 10000))]);
return read;
"""
POSTS, GETS = 9, 9
MADE = {
    "beacon": POSTS, "opaque": POSTS, "simple": POSTS, "json": POSTS, "get": GETS,
    "opaque-get": GETS, "delete": 1, "img": 1, "script": 1, "css": 1, "iframe": 1, "silent": 1,
    "sandbox": 1, "sandbox-img": 1, "form": 2, "form-get": 1, "window": 2, "source": 3, "socket": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "site"),
    [
        ("open", "evil.test"),
        ("open", "127.0.0.1"),  # another port: of the same site, and sent its cookies
        ("open", "rebound.test"),  # of the server's own origin, as the browser has it
        ("token", "127.0.0.1"),
    ],
)
async def test_a_hostile_page(
    mode: str, site: str, browser: Browser, front: StartFront, server: StartServer
) -> None:
    """All that it tries arrives, and is refused; it reads nothing but that."""
    auth = {"mode": "token", "jwt_secret": SECRET} if mode == "token" else {}
    keys = json.dumps([{"key": SERVICE, "user": "operator", "service": True}])
    running = server(auth=auth, server={"drain": 0.0}, env={"RIVULET_AUTH__KEYS": keys})
    victim, evil = await front(running.url), await front(running.url)
    url, cookie = victim.url, f"rivulet_token={token('ann')}" if mode == "token" else ""
    if site == "rebound.test":
        evil, url = victim, url.replace("127.0.0.1", site)
    own = {"Authorization": f"Bearer {token('ann')}", "X-User-Id": "ann"}
    async with dialled(running.url, "/ws/private", headers=own) as raw:
        ann = Socket(raw)
        await ann.hear("joined")
        model = "demo:rate=2,tokens=1000"
        stream = (await ann.call("generate", message="for ann only", model=model))["stream_id"]
        given = {"server": url, "stream": stream, "cookie": cookie}
        read = await browser.run(evil, ATTACK, host=site, **given)
        assert all("host_not_allowed" in got for got in read.values())
        assert not read or site == "rebound.test"
        asked = [each for each in victim.asked if not each.target.startswith("/favicon")]
        assert Counter(each.target.rpartition("by=")[2] for each in asked) == MADE
        assert {each.response[9:12] for each in asked} == {b"403"}
        for each in asked if mode == "token" else ():
            if each.target.endswith(("by=img", "by=opaque", "by=form", "by=window", "by=socket")):
                assert each.headers["cookie"] == cookie

        told = {each["type"] for each in await ann.so_far()}
        assert told <= {"message", "stream_start", "stream_chunk"}
        assert (await ann.call("presence"))["members"] == ["ann"]
        assert len((await ann.call("history"))["messages"]) == 1
        operator = {"X-API-Key": SERVICE}
        async with ask("GET", f"{running.url}/metrics", headers=operator) as answer:
            counted = (await answer.body()).decode()
        assert "rivulet_generations_running 1.0" in counted
        assert "rivulet_generations_total{" not in counted


# What an honest page does, with the credentials that its browser has.
USE = """
document.cookie = given.cookie;
const {server} = given, room = "/api/v1/rooms/shared", got = {};
const get = (path) => fetch(server + path, {credentials: "include"});
const post = (path, body) => fetch(server + path, {
  method: "POST", credentials: "include", body: JSON.stringify(body),
  headers: {"Content-Type": "application/json", "Idempotency-Key": path},
});
const answer = await post("/api/chat/stream", {message: "hello", model: "demo:rate=2,tokens=1000"});
const stream = answer.headers.get("X-Stream-Id");
got.stopped = (await (await post(`/api/v1/streams/${stream}/stop`)).json()).state;
got.generated = (await (await get("/stream?prompt=hello&model=demo:tokens=3")).text()).length > 0;
got.published = (await post(`${room}/messages`, {content: "by fetch"})).status;
const first = (source, type) => new Promise((done, failed) => {
  source.addEventListener(type, (e) => done(e.data));
  source.onerror = source.onclose = failed;
});
const source = new EventSource(`${server}${room}/events`, {withCredentials: true});
got.members = JSON.parse(await first(source, "joined")).members;
const socket = new WebSocket(server.replace("http", "ws") + "/ws/shared");
await first(socket, "message");
socket.send(JSON.stringify({content: "by socket"}));
await first(socket, "message");
const echo = new WebSocket(server.replace("http", "ws") + "/echo");
await first(echo, "open");
echo.send("hello");
got.echo = await first(echo, "message");
const {messages} = await (await get(`${room}/messages`)).json();
got.history = messages.map(({userId, content}) => [userId, content]);
return got;
"""


@pytest.mark.parametrize(
    ("mode", "site", "user"), [("open", "app.test", "anonymous"), ("token", "127.0.0.1", "ann")]
)
async def test_a_page_of_a_listed_origin(
    mode: str, site: str, user: str, browser: Browser, front: StartFront, server: StartServer
) -> None:
    """Of another site or with a cookie: it generates, stops, publishes and reads."""
    page = await front("")
    auth = {"mode": "token", "jwt_secret": SECRET} if mode == "token" else {}
    running = server(auth=auth, cors={"origins": [page.url.replace("127.0.0.1", site)]})
    cookie = f"rivulet_token={token('ann')}"
    assert await browser.run(page, USE, host=site, server=running.url, cookie=cookie) == {
        "stopped": "cancelled",
        "generated": True,
        "published": 201,
        "members": [user],
        "echo": "hello",
        "history": [[user, "by fetch"], [user, "by socket"]],
    }
