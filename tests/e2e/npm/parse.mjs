// Asks the server given as the only argument for objects of a zod schema with the openai package. Prints them as JSON.

import { zodResponseFormat } from "openai/helpers/zod";
import OpenAI from "openai";
import { Fruit, maxTokens, messages, model } from "./fruit.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const asked = {
  model,
  messages,
  max_tokens: maxTokens,
  temperature: 0,
  response_format: zodResponseFormat(Fruit, "fruit"),
};

const whole = await client.chat.completions.parse(asked);
const streamed = await client.chat.completions.stream(asked).finalChatCompletion();

console.log(JSON.stringify({ fruits: [whole, streamed].map((answer) => answer.choices[0].message.parsed) }));
