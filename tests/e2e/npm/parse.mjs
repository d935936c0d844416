// Asks the server given as the only argument for objects and calls of a zod schema with the openai package.
// Prints them as JSON.

import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import OpenAI from "openai";
import { Fruit, maxTokens, messages, model } from "./fruit.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const common = { model, messages, max_tokens: maxTokens, temperature: 0 };
const asked = { ...common, response_format: zodResponseFormat(Fruit, "fruit") };
const calling = {
  ...common,
  tools: [zodFunction({ name: "record_fruit", parameters: Fruit })],
  tool_choice: "required",
  parallel_tool_calls: false,
};

const whole = await client.chat.completions.parse(asked);
const streamed = await client.chat.completions.stream(asked).finalChatCompletion();

const called = await client.chat.completions.parse(calling);
const runner = client.chat.completions.stream(calling);
let pieces = "";
runner.on("tool_calls.function.arguments.delta", ({ arguments_delta }) => (pieces += arguments_delta));
const calls = [called, await runner.finalChatCompletion()].map((answer) => answer.choices[0]);

console.log(
  JSON.stringify({
    fruits: [whole, streamed].map((answer) => answer.choices[0].message.parsed),
    calls: calls.map((choice) => choice.message.tool_calls[0].function.parsed_arguments),
    names: calls.map((choice) => choice.message.tool_calls[0].function.name),
    finishReasons: calls.map((choice) => choice.finish_reason),
    pieces,
  }),
);
