// Prints the texts of WAV files (16 kHz, one channel, float32) by transformers.js, as one JSON list.
// node transcribe.mjs LIBRARY MODEL OPTIONS FILE...
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [library, model, options, ...files] = process.argv.slice(2);
const { env, pipeline } = await import(pathToFileURL(`${library}/dist/transformers.node.mjs`));
env.allowRemoteModels = false;

function samples(file) {
  const bytes = readFileSync(file);
  const start = bytes.indexOf("data") + 8;
  const length = bytes.readUInt32LE(start - 4);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + start + length));
}

const transcribe = await pipeline("automatic-speech-recognition", model);
const texts = [];
for (const file of files) texts.push((await transcribe(samples(file), JSON.parse(options))).text);
console.log(JSON.stringify(texts));
