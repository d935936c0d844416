// What parse.mjs and ai_sdk.mjs ask for: an object that ends soon, whatever the model thinks of fruit.

import { z } from "zod";

export const model = "smollm2";
export const question = "Describe a ripe banana.";
export const messages = [{ role: "user", content: question }];
export const maxTokens = 96;
export const tooLong = "word ".repeat(9000);

export const Fruit = z.object({
  name: z.string().max(16),
  colour: z.enum(["red", "green", "yellow"]),
  grams: z.number().int().min(1).max(5000),
  tags: z.array(z.enum(["sweet", "sour", "round"])).max(2),
});
