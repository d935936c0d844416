// Asks the server given as the only argument for objects, calls and texts with Vercel's ai. Prints them as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, streamText, tool } from "ai";
import { Fruit, maxTokens, model as name, question, tooLong } from "./fruit.mjs";

const provider = createOpenAICompatible({
  name: "logitserve",
  baseURL: `${process.argv[2]}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const asked = { model, prompt: question, temperature: 0, maxOutputTokens: maxTokens, maxRetries: 0 };
const output = Output.object({ schema: Fruit });

const whole = await generateText({ ...asked, output });
const stream = streamText({ ...asked, output });
let partial;
for await (partial of stream.partialOutputStream);

const calling = {
  ...asked,
  toolChoice: "required",
  tools: { recordFruit: tool({ inputSchema: Fruit }) },
  providerOptions: { logitserve: { parallel_tool_calls: false } },
};
const called = await generateText(calling);
const callStream = streamText(calling);
await callStream.consumeStream();
const calls = [...called.toolCalls, ...(await callStream.toolCalls)];

const short = { ...asked, maxOutputTokens: 4 };
const words = streamText(short);
let text = "";
for await (const delta of words.textStream) text += delta;

const refused = await generateText({ ...asked, prompt: tooLong }).catch((error) => error);

console.log(
  JSON.stringify({
    fruits: [whole.output, await stream.output, partial],
    calls: calls.map((call) => call.input),
    names: calls.map((call) => call.toolName),
    callReasons: [called.finishReason, await callStream.finishReason],
    texts: [(await generateText(short)).text, text],
    usage: (await words.usage).outputTokens,
    finishReasons: [whole.finishReason, await words.finishReason],
    refused: APICallError.isInstance(refused) ? [refused.statusCode, refused.message] : null,
  }),
);
