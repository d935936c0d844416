// Reads /v1/logits of the server given as the only argument with apache-arrow. Exits with 1 at the first broken promise.

import assert from "node:assert/strict";
import { RecordBatchReader } from "apache-arrow";

const prompt = [5, 100, 7, 30000, 12, 12, 9];

async function* batches(body) {
  const response = await fetch(`${process.argv[2]}/v1/logits`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.equal(response.status, 200);
  assert.equal(response.headers.get("content-type"), "application/vnd.apache.arrow.stream");
  yield* await RecordBatchReader.from(response.body);
}

const positions = [];
const tokens = [];
for await (const batch of batches({ input: prompt, max_tokens: 2, positions: "all", temperature: 0 })) {
  assert.equal(batch.schema.metadata.get("dtype"), "float32");
  const rows = batch.getChild("logits");
  for (let i = 0; i < batch.numRows; i++) {
    const row = rows.get(i).toArray();
    assert.ok(row instanceof Float32Array);
    assert.equal(row.length, 49152);
    const position = batch.getChild("position").get(i);
    const token = batch.getChild("token_id").get(i);
    if (tokens.length >= prompt.length) {
      assert.equal(row.indexOf(Math.max(...row)), token);
    }
    positions.push(position);
    tokens.push(token);
  }
}
assert.deepEqual(positions, [1, 2, 3, 4, 5, 6, 7, 7, 8]);
assert.deepEqual(tokens.slice(0, prompt.length), [...prompt.slice(1), null]);

for await (const batch of batches({ input: prompt, top_k: 3, dtype: "float16" })) {
  assert.equal(batch.getChild("top_ids").get(0).toArray().length, 3);
  assert.equal(batch.getChild("top_logits").get(0).length, 3);
}

console.log("every promise held");
