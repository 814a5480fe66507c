// Requests to the server that served the page, and to no other. Paths are relative to the page, so that a proxy may
// serve both under a prefix. The API key is kept in a variable of this module and sent in a header, and stored nowhere.

export const CHAT_URL = new URL("../v1/chat/completions", document.baseURI).href;

let key = "";

export function setKey(newKey) {
  key = newKey;
}

export function isKeyed() {
  return key !== "";
}

/** An error response, or a server that cannot be reached (status 0). The message is the server's, if it sent one. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function send(path, { method = "GET", body, headers = {}, signal, keepalive = false } = {}) {
  const request = { method, signal, keepalive, headers: { ...headers }, cache: "no-store", referrerPolicy: "no-referrer" };
  if (key) request.headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) {
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(`../v1/${path}`, document.baseURI), request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running, and is this machine online?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The server refused (HTTP ${response.status}).`;
  let code = null;
  try {
    const { error } = await response.json();
    message = error.message || message;
    code = error.code ?? null;
  } catch {
    // an HTML page of a proxy: only the status is useful
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ApiError(message, { status: response.status, code, retryAfter: Number.isNaN(seconds) ? null : seconds });
}

export async function loadExperts() {
  return (await send("experts")).json();
}

/** At most `most` saved profiles, in the order of their names. */
export async function loadProfiles(most) {
  const profiles = [];
  for (let hasMore = true; hasMore && profiles.length < most; ) {
    const after = profiles.length ? `&after=${encodeURIComponent(profiles.at(-1).user)}` : "";
    const page = await (await send(`profiles?limit=100${after}`)).json();
    profiles.push(...page.data);
    hasMore = page.has_more && page.data.length > 0;
  }
  return profiles;
}

/** One page of saved profiles, in the order of their names: `{data, has_more}`. */
export async function findProfiles({ search, after, limit }, signal) {
  return (await send(`profiles?${new URLSearchParams({ search, after, limit })}`, { signal })).json();
}

/** The current version of a saved profile. */
export async function loadProfile(user) {
  return (await send(`profiles/${encodeURIComponent(user)}`)).json();
}

/** All versions of a profile, the oldest first. */
export async function loadVersions(user) {
  return (await (await send(`profiles/${encodeURIComponent(user)}?history=true`)).json()).data;
}

/**
 * Save a profile. The error has status 412 if the profile exists and `isReplacing` is false, or if its current version
 * is not `version`.
 */
export async function saveProfile(user, profile, { isReplacing = false, version = null }) {
  const headers = version !== null ? { "If-Match": `"${version}"` } : isReplacing ? {} : { "If-None-Match": "*" };
  await send(`profiles/${encodeURIComponent(user)}`, { method: "PUT", body: profile, headers });
}

/** Delete a profile with all versions. The error has status 412 if its current version is another one. */
export async function deleteProfile(user, version) {
  await send(`profiles/${encodeURIComponent(user)}`, { method: "DELETE", headers: { "If-Match": `"${version}"` } });
}

function questionsPath(user, rest = "", query = {}) {
  const known = Object.entries(query).filter(([, value]) => value !== null);
  return `profiles/${encodeURIComponent(user)}/questions${rest}?${new URLSearchParams(known)}`;
}

/** The next question of a user, and what the answers show; `num` is the number of questions, null for the server's own. */
export async function loadQuestions(user, num) {
  return (await send(questionsPath(user, "", { num_questions: num }))).json();
}

/** Answer the current question: `choice` is first, second, tie or skip. A repeated request changes nothing. */
export async function answerQuestion(user, question, choice, num) {
  const request = { method: "POST", body: { question, choice } };
  return (await send(questionsPath(user, "", { num_questions: num }), request)).json();
}

/** Take back the answer to `question`, which must be the last one. A repeated request changes nothing. */
export async function takeBackAnswer(user, question, num) {
  return (await send(questionsPath(user, "/last", { question, num_questions: num }), { method: "DELETE" })).json();
}

/** Delete all answers of a user; with `keepalive` even while the page is left. */
export async function deleteAnswers(user, { keepalive = false } = {}) {
  await send(questionsPath(user), { method: "DELETE", keepalive });
}

/** Save the profile that the answers give as the user's next version. */
export async function finishQuestions(user) {
  await send(questionsPath(user, "/finish"), { method: "POST" });
}

/** The scores of an answer: a list with one row per dimension. */
export async function loadScores(prompt, answer, signal) {
  const response = await send("scores", { method: "POST", body: { prompt, answers: [answer] }, signal });
  return (await response.json()).data[0];
}

/** Yield the chunks of an answer as they arrive. */
export async function* streamAnswer(request, signal) {
  const response = await send("chat/completions", { method: "POST", body: request, signal });
  let isDone = false;
  try {
    for await (const data of events(response.body)) {
      isDone = data === "[DONE]";
      if (isDone) continue; // read to the end of the stream: the server would take an early end for a cancelled request
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message || "The answer failed on the server.", { status: 500 });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection was lost before the answer was whole.");
  }
  if (!isDone) throw new ApiError("The connection ended before the answer was whole.");
}

/** Yield the data of each server-sent event. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, so that the server stops generating
  }
}
