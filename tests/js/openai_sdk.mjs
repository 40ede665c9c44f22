// The stock openai package as a client.
//
//   node openai_sdk.mjs stream|plain|tools|models|model|leave BASE_URL [REQUEST_JSON] [OPTIONS_JSON]
//   node openai_sdk.mjs all BASE_URL '[["stream", REQUEST], ["models", {}], ...]' [OPTIONS_JSON]
//
// prints one line of JSON: what the package gave, and under `error` what it threw, if it did; with
// `all` a list of these, in order.

import OpenAI from "openai";

const [command, baseURL, given = "{}", options = "{}"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "sk-test", maxRetries: 0, ...JSON.parse(options) });
const defaults = { model: "demo", messages: [{ role: "user", content: "hello" }] };

/** Reads a stream to its end, however it ends; `result` holds what came until then. The text, the
 * finish reason and the tool calls are the first choice's; `choices` has them all. */
async function read(stream, result) {
  Object.assign(result, { chunks: 0, text: "", finish_reason: null, usage: null, tool_calls: [] });
  result.choices = [];
  for await (const chunk of stream) {
    result.chunks += 1;
    result.id = chunk.id;
    result.object = chunk.object;
    if (chunk.usage) result.usage = chunk.usage;
    for (const { index, delta, finish_reason, logprobs } of chunk.choices) {
      const choice = (result.choices[index] ??= { text: "", reasoning: "", refusal: "", tokens: [] });
      choice.text += delta.content ?? "";
      choice.reasoning += delta.reasoning_content ?? "";
      choice.refusal += delta.refusal ?? "";
      choice.tokens.push(...(logprobs?.content ?? []).map((entry) => entry.token));
      if (finish_reason) choice.finish_reason = finish_reason;
      if (index !== 0) continue;
      if (delta.role) result.role = delta.role;
      result.text += delta.content ?? "";
      if (finish_reason) result.finish_reason = finish_reason;
      for (const call of delta.tool_calls ?? []) {
        const whole = (result.tool_calls[call.index] ??= { name: "", arguments: "" });
        if (call.id) whole.id = call.id;
        whole.name += call.function?.name ?? "";
        whole.arguments += call.function?.arguments ?? "";
      }
    }
  }
}

const commands = {
  async stream(ask, result) {
    await read(await client.chat.completions.create({ ...ask, stream: true }), result);
  },
  async plain(ask, result) {
    result.completion = await client.chat.completions.create(ask);
  },
  /** The package's own helper, which is stricter: it puts a stream's pieces together itself. */
  async tools(ask, result) {
    const runner = client.chat.completions.stream({ ...ask });
    result.completion = await runner.finalChatCompletion();
  },
  async models(ask, result) {
    result.models = [];
    for await (const model of client.models.list()) result.models.push(model.id);
  },
  async model(ask, result) {
    result.model = await client.models.retrieve(ask.model);
  },
  /** Aborts after the first chunk. */
  async leave(ask, result) {
    const stream = await client.chat.completions.create({ ...ask, stream: true });
    for await (const chunk of stream) {
      result.id = chunk.id;
      stream.controller.abort();
    }
  },
};

async function run(name, request) {
  const result = { error: null };
  try {
    await commands[name]({ ...defaults, ...request }, result);
  } catch (error) {
    const { status, code, type, param, message, headers } = error;
    const classes = [];
    for (let at = error.constructor; at?.name; at = Object.getPrototypeOf(at)) classes.push(at.name);
    const retry_after = headers?.get?.("retry-after") ?? null;
    result.error = { class: classes[0], classes, status, code, type, param, message, retry_after };
  }
  return result;
}

const asked = JSON.parse(given);
const all = () => Promise.all(asked.map(([name, request]) => run(name, request)));
console.log(JSON.stringify(await (command === "all" ? all() : run(command, asked))));
