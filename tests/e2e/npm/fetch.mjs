// Sends the request that it reads as JSON from standard input, and writes status, headers and body as JSON.

import { readFileSync } from "node:fs";

const { method, url, headers, body } = JSON.parse(readFileSync(0, "utf8"));
const response = await fetch(url, { method, headers, body: body === null ? undefined : Buffer.from(body, "base64") });
const content = Buffer.from(await response.arrayBuffer()).toString("base64");
console.log(JSON.stringify({ status: response.status, headers: [...response.headers], body: content }));
