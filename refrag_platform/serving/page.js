// The page at /: it asks this server as any client does, by the routes of docs/serving.md.
"use strict";

const at = (id) => document.getElementById(id);
const SECONDS_BETWEEN_LOOKS = 3;
let model = null;
let share = null; // p as the slider says; null: the model's own
let asking = null; // an AbortController, while an answer is awaited

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `${path} answered ${response.status}`);
  error.status = response.status;
  throw error;
}

// Which model there is, and whether documents can be added; asked again while the model is being loaded.
async function look() {
  at("documents").hidden = true;
  try {
    model = (await (await call("v1/models")).json()).data[0].id;
    at("model").textContent = model;
    at("fault").textContent = "";
    await call("v1/documents?limit=1");
    at("documents").hidden = false;
  } catch (error) {
    if (error.status === 501) return; // documents are off
    at("fault").textContent = error.message;
    if (error.status === 503) setTimeout(look, SECONDS_BETWEEN_LOOKS * 1000);
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// One answer, streamed into an element; what it cost: the answer's `refrag` field and the seconds to its end.
async function answer(question, p, into) {
  const body = { model, messages: [{ role: "user", content: question }], stream: true };
  if (p !== null) body.share_kept = p;
  const begun = performance.now();
  let refrag = null;
  for await (const event of events(await call("v1/chat/completions", body, asking.signal))) {
    if (event.error) throw new Error(event.error.message);
    into.textContent += event.choices[0]?.delta.content ?? "";
    refrag = event.refrag ?? refrag;
  }
  if (!refrag) throw new Error("the answer broke off");
  return { ...refrag, wall: (performance.now() - begun) / 1000 };
}

async function ask(submitted) {
  submitted.preventDefault();
  const question = at("question").value;
  asking = new AbortController();
  working(true);
  for (const id of ["fault", "answer", "full-answer"]) at(id).textContent = "";
  at("passages").replaceChildren();
  at("result").hidden = false;
  for (const id of ["cost", "full"]) at(id).hidden = true;
  try {
    if (model === null) await look();
    const told = await answer(question, share, at("answer"));
    if (share === null) at("share").value = told.share_kept;
    at("shown").textContent = `${told.share_kept}${share === null ? " (the model’s own)" : ""}`;
    showCost(told, null);
    await showPassages(question, told);
    if (at("beside").checked && told.answered && told.chunks) {
      at("full").hidden = false;
      showCost(told, await answer(question, 1, at("full-answer")));
    }
  } catch (error) {
    at("fault").textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  working(false);
}

function working(on) {
  at("send").disabled = on;
  at("stop").disabled = !on;
  at("result").ariaBusy = on;
}

function showCost(told, full) {
  const rows = [
    ["positions that the decoder reads", (one) => one.prompt_positions.toLocaleString("en")],
    ["of them known from an earlier prompt", (one) => one.positions_reused.toLocaleString("en")],
    ["first token after, ms", (one) => one.time_to_first_token_ms?.toFixed(0) ?? "–"],
    ["whole answer after, s", (one) => one.wall.toFixed(2)],
  ].map(([name, figure]) => {
    const row = element("tr");
    const head = element("th", name);
    head.scope = "row";
    row.append(head, element("td", figure(told)), element("td", full ? figure(full) : "–"));
    return row;
  });
  // Known without asking: the same prompt with every chunk as its tokens.
  if (!full) rows[0].lastChild.textContent = told.plain_prompt_tokens.toLocaleString("en");
  at("cost").tBodies[0].replaceChildren(...rows);
  at("cost").hidden = false;
}

// The answer names its passages by their beginnings; the search gives them whole.
async function showPassages(question, told) {
  const read = [...told.citations, ...told.retrieved];
  if (!read.length) return;
  const search = await call("v1/retrieve", { query: question, k: read.length }, asking.signal);
  const texts = new Map((await search.json()).data.map((one) => [one.id, one.text]));
  if (!told.answered) {
    const near = `similarity ${told.similarity?.toFixed(3) ?? "–"}, ${told.least_similarity} needed`;
    at("passages").append(element("p", `None is near enough to be read: ${near}.`));
  }
  for (const passage of read) at("passages").append(passageShown(passage, texts.get(passage.id) ?? passage.text));
}

function passageShown(passage, text) {
  const shown = element("article");
  const head = element("h3", passage.title || "untitled");
  const near = passage.score === null ? "" : `, similarity ${passage.score.toFixed(3)}`;
  const facts = `${passage.id}: ${passage.chunks_expanded} of ${passage.chunks} chunks kept${near}`;
  const body = element("p");
  const characters = Array.from(text); // as the server counts them
  let end = 0;
  for (const chunk of passage.selection) {
    if (chunk.end === 0) {
      head.append(" ", chunkShown("title", chunk));
    } else {
      body.append(chunkShown(characters.slice(end, chunk.end).join(""), chunk));
      end = chunk.end;
    }
  }
  body.append(characters.slice(end).join(""));
  shown.append(head, element("small", facts), body);
  return shown;
}

function chunkShown(text, chunk) {
  const shown = element("span", text, chunk.kept ? "chunk kept" : "chunk");
  shown.title = chunk.kept ? "kept as tokens" : "compressed to a vector";
  if (chunk.score !== null) shown.append(element("sub", chunk.score.toFixed(2)));
  return shown;
}

async function add(submitted) {
  submitted.preventDefault();
  at("added").textContent = "adding …";
  const document = { id: at("id").value, title: at("title").value, text: at("text").value };
  try {
    const told = await (await call("v1/documents", { documents: [document] })).json();
    at("added").textContent = `${told.data[0].id} is in the store, passages: ${told.data[0].passages}`;
    at("add").reset();
  } catch (error) {
    at("added").textContent = error.message;
  }
}

at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!at("send").disabled) at("ask").requestSubmit();
});
at("stop").addEventListener("click", () => asking.abort());
at("share").addEventListener("input", () => {
  share = Number(at("share").value);
  at("shown").textContent = share;
});
at("reset").addEventListener("click", () => {
  share = null;
  at("shown").textContent = "the model’s own";
});
at("add").addEventListener("submit", add);
// Kept for this tab alone.
at("key").value = sessionStorage.getItem("key") ?? "";
at("access").addEventListener("submit", (event) => event.preventDefault()); // Enter is a change, too
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  look();
});
look();
