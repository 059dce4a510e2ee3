// Transcribes a recording or a file with the model in the directory beside this page: `model`, or ?model=DIRECTORY.

const LOCAL = new URL("./transformers.js/", location.href).href; // the library and the runtime, see README.md
const RATE = 16_000;
const BLOCK = /^[^/\\]+$/; // a directory beside the page

const element = (id) => document.getElementById(id);
const model = new URLSearchParams(location.search).get("model") ?? "model";
let transcribe, config, seconds, recorder;

function showStatus(text) {
  element("status").textContent = text;
}

function showError(text) {
  element("error").textContent = text;
  element("error").hidden = !text;
}

async function loadLibrary() {
  let library;
  try {
    library = await import(`${LOCAL}transformers.min.js`);
  } catch (error) {
    throw new Error(`transformers.js can't be loaded. Copy it to transformers.js/, as README.md says. (${error.message})`);
  }
  const { env } = library;
  env.backends.onnx.wasm.wasmPaths = LOCAL;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.localModelPath = new URL("./", location.href).pathname;
  env.useBrowserCache = false; // it would keep an old export of the same name
  return library;
}

async function readJson(name) {
  const answer = await fetch(`./${model}/${name}`);
  if (!answer.ok) throw new Error(`${model}/${name} isn't there. Export a model to ${model}/, as README.md says.`);
  return answer.json();
}

function showLanguages() {
  if (!config.is_multilingual) return;
  const names = new Intl.DisplayNames(["en"], { type: "language", fallback: "code" });
  for (const token of Object.keys(config.lang_to_id)) {
    const code = token.slice(2, -2);
    const selected = code === (config.language ?? "en");
    element("language").append(new Option(names.of(code), code, selected, selected));
  }
  element("languages").hidden = false;
}

async function load() {
  if (!BLOCK.test(model)) throw new Error("?model= must be the name of a directory beside this page.");
  config = await readJson("generation_config.json");
  seconds = (await readJson("preprocessor_config.json")).chunk_length;
  const { pipeline } = await loadLibrary();
  const progress_callback = ({ status, file, progress }) => {
    if (status === "progress") showStatus(`Loading ${file}: ${Math.round(progress)} %`);
  };
  transcribe = await pipeline("automatic-speech-recognition", model, { device: "wasm", progress_callback });
  showLanguages();
  element("controls").hidden = false;
  showStatus(`Ready: ${model}, with a window of ${seconds} s.`);
}

// 16 kHz, one channel
async function decode(data) {
  const context = new OfflineAudioContext(1, 1, RATE);
  let decoded;
  try {
    decoded = await context.decodeAudioData(data);
  } catch {
    throw new Error("This browser can't read the audio. Try a WAV, MP3 or FLAC file.");
  }
  if (!decoded.length) throw new Error("The audio is empty.");
  const mixed = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; ++channel) {
    decoded.getChannelData(channel).forEach((value, i) => { mixed[i] += value / decoded.numberOfChannels; });
  }
  return mixed;
}

async function show(blob) {
  showError("");
  element("text").textContent = element("time").textContent = "";
  element("player").src = URL.createObjectURL(blob);
  element("player").hidden = false;
  const controls = element("controls").elements;
  for (const control of controls) control.disabled = true;
  try {
    const audio = await decode(await blob.arrayBuffer());
    showStatus("Transcribing …");
    await new Promise((done) => setTimeout(done)); // shows the status before the work
    const options = audio.length > seconds * RATE ? { chunk_length_s: seconds } : {};
    if (config.is_multilingual) Object.assign(options, { language: element("language").value, task: "transcribe" });
    const start = performance.now();
    const { text } = await transcribe(audio, options);
    const spent = (performance.now() - start) / 1000;
    element("text").textContent = text.trim() || "(no speech)";
    element("time").textContent = `${(audio.length / RATE).toFixed(1)} s of audio in ${spent.toFixed(1)} s`;
  } catch (error) {
    showError(error.message);
  } finally {
    showStatus("Ready.");
    for (const control of controls) control.disabled = false;
  }
}

async function record() {
  if (recorder?.state === "recording") {
    recorder.stop();
    return;
  }
  showError("");
  if (!navigator.mediaDevices?.getUserMedia) {
    showError("The microphone requires https or localhost. Open this page as http://localhost:8000.");
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    showError(`The microphone can't be used: ${error.message}. Allow it in the browser, or choose a file.`);
    return;
  }
  const parts = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.onstop = () => {
    for (const track of stream.getTracks()) track.stop();
    element("record").textContent = "Record";
    show(new Blob(parts, { type: recorder.mimeType }));
  };
  recorder.start();
  element("record").textContent = "Stop";
  showStatus("Recording …");
}

element("record").addEventListener("click", record);
element("file").addEventListener("change", ({ target }) => target.files.length && show(target.files[0]));
load().catch((error) => {
  showStatus("Not ready.");
  showError(error.message);
});
