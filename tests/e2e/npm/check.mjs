// Drives the server given as the only argument with the openai package. Exits with 1 at the first broken promise.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "smollm2";
const messages = [{ role: "user", content: "Name three colours." }];
const greedy = { model, messages, max_tokens: 8, temperature: 0 };

const whole = await client.chat.completions.create(greedy);
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.usage.completion_tokens, 8);

const stream = await client.chat.completions.create({
  ...greedy,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(usage.completion_tokens, 8);

const helper = client.chat.completions.stream({ ...greedy, logprobs: true, top_logprobs: 2 });
const final = await helper.finalChatCompletion();
assert.equal(final.choices[0].message.content, text);
assert.equal(final.choices[0].logprobs.content.length, 8);
assert.equal(final.choices[0].logprobs.content[0].top_logprobs.length, 2);

const seeded = () => client.chat.completions.create({ ...greedy, temperature: 1.5, n: 3, seed: 5 });
const texts = (answer) => answer.choices.map((choice) => choice.message.content);
const first = texts(await seeded());
assert.equal(new Set(first).size > 1, true);
assert.deepEqual(texts(await seeded()), first);

const stopped = await client.completions.create({
  model,
  prompt: "1 2 3 4 5",
  max_tokens: 16,
  temperature: 0,
  stop: [" 7"],
});
assert.equal(stopped.choices[0].finish_reason, "stop");
assert.equal(stopped.choices[0].text.includes("7"), false);

const scored = await client.completions.create({ model, prompt: "1 2 3", max_tokens: 1, echo: true, logprobs: 1 });
assert.equal(scored.choices[0].logprobs.tokens.join(""), scored.choices[0].text);

const logits = await client.chat.completions.create({ ...greedy, return_logits: { dtype: "float32" } });
const block = logits.choices[0].logits.generated;
const bytes = Buffer.from(block.data, "base64");
const rows = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
assert.deepEqual(block.shape, [8, 49152]);
logits.choices[0].token_ids.forEach((token, row) => {
  const scores = rows.subarray(row * 49152, (row + 1) * 49152);
  assert.equal(scores.indexOf(scores.reduce((a, b) => Math.max(a, b))), token);
});

await assert.rejects(client.chat.completions.create({ ...greedy, temperature: 9 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(client.chat.completions.create({ ...greedy, model: "gpt-9" }), OpenAI.NotFoundError);
assert.equal((await client.models.list()).data[0].id, model);

console.log("every promise held");
