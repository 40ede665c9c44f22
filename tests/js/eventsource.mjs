// The eventsource package, which behaves as a browser's EventSource does.
//
//   node eventsource.mjs URL OPTIONS_JSON
//
// OPTIONS: {"events": ["joined", ...], "until": TEXT, "errors": N, "seconds": S}. Listens to
// `message` and the named events until a message's data contains TEXT (then it closes), until the
// source has closed itself, or until it has failed N times. Prints one line of JSON.

import { EventSource } from "eventsource";

const [url, given = "{}"] = process.argv.slice(2);
const { events = [], until = null, errors = Infinity, seconds = 60 } = JSON.parse(given);
const result = { opens: 0, messages: [], errors: [], ended: "" };
const source = new EventSource(url);

function end(why) {
  result.ended = why;
  source.close();
  console.log(JSON.stringify(result));
  process.exit(0);
}

function take({ type, data, lastEventId }) {
  result.messages.push({ event: type, data, id: lastEventId });
  if (until !== null && data.includes(until)) end("until");
}

source.onopen = () => (result.opens += 1);
for (const name of ["message", ...events]) source.addEventListener(name, take);
source.onerror = (error) => {
  const closed = source.readyState === EventSource.CLOSED;
  result.errors.push({ code: error.code ?? null, message: error.message ?? null, closed });
  if (closed) end("closed");
  else if (result.errors.length >= errors) end("errors");
};
setTimeout(() => end("timeout"), seconds * 1000);
