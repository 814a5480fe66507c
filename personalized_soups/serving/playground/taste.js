// "Find my taste": questions with two answers each, one card after another, and the mixture that the answers give.
//
// The server keeps the answers and decides what is asked next, so this page keeps only the name. Without a name, the
// page makes one that nobody can guess, and deletes its answers when it is left.

import { answerQuestion, deleteAnswers, finishQuestions, loadQuestions, takeBackAnswer } from "./api.js";
import { mixtureText } from "./profile.js";

const MORE = 5; // questions that the button for more adds
const KEYS = {
  1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second",
  0: "tie", "=": "tie", s: "skip", S: "skip", Backspace: "back",
}; // prettier-ignore

const id = (name) => document.getElementById(`taste-${name}`);
const dialog = document.getElementById("taste");

export class Taste {
  #on;
  #user = "";
  #guest = ""; // the name that this page has made
  #num = null; // the number of questions that was asked for; null leaves it to the server
  #state = null; // the server's last answer
  #isBusy = false;
  #isStopping = false; // stop after the request that is under way
  #again = null; // what "Try again" does

  /**
   * `on.use(profile, user)` is called with a profile for the sliders; user is null if the profile is not saved.
   * `on.refusedKey` is called for a 401.
   */
  constructor(on) {
    this.#on = on;
    id("start").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#begin(id("user").value.trim());
    });
    for (const button of dialog.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", (event) => {
        if (event.detail < 2) this.#choose(button.dataset.choice); // a double click must not answer two questions
      });
    }
    for (const button of dialog.querySelectorAll(".taste-close")) button.addEventListener("click", () => dialog.close());
    id("again").addEventListener("click", () => this.#again?.());
    id("use").addEventListener("click", () => this.#use());
    id("more").addEventListener("click", () => this.#more());
    id("delete").addEventListener("click", () => this.#confirm(true));
    id("keep").addEventListener("click", () => this.#confirm(false));
    id("delete-yes").addEventListener("click", () => this.#delete());
    id("forget").addEventListener("click", () => this.#delete());
    dialog.addEventListener("keydown", (event) => this.#press(event));
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.#choose("stop");
    });
    addEventListener("pagehide", () => {
      if (this.#guest) deleteAnswers(this.#guest, { keepalive: true }).catch(() => {});
      this.#guest = "";
    });
  }

  /** Open the dialog; `user` is a name to start with, or the only one that the API key allows. */
  open(user, isOnlyUser) {
    if (!id("user").value || isOnlyUser) id("user").value = user;
    id("user").readOnly = isOnlyUser;
    this.#show("start", "Find my taste");
    dialog.showModal();
    // on a phone, a focused field brings up a keyboard that covers the dialog
    id(matchMedia("(pointer: coarse)").matches ? "title" : "user").focus();
  }

  #begin(user) {
    if (user === "." || user === "..") return this.#complain("Browsers take this name out of an address: choose another.");
    if (!user) this.#guest ||= `guest-${crypto.getRandomValues(new Uint32Array(3)).join("-")}`;
    if ((user || this.#guest) !== this.#user) this.#num = null;
    this.#user = user || this.#guest;
    return this.#load();
  }

  // ---- the requests ----

  /** Send a request, and pass its result to `show`. One request at a time: others are ignored. */
  async #run(request, show = (state) => this.#showState(state)) {
    if (this.#isBusy) return;
    this.#isBusy = true;
    dialog.setAttribute("aria-busy", "true");
    this.#complain("");
    try {
      show(await request());
    } catch (error) {
      this.#fail(error, () => this.#run(request, show));
    } finally {
      this.#isBusy = this.#isStopping = false;
      dialog.setAttribute("aria-busy", "false");
    }
  }

  #load() {
    return this.#run(() => loadQuestions(this.#user, this.#num));
  }

  #fail(error, again) {
    if (error.status === 401) {
      dialog.close();
      return this.#on.refusedKey(error);
    }
    if (["already_answered", "not_asked", "not_last", "answers_changed"].includes(error.code)) {
      const text = "Somebody with this name has answered in another window.";
      return this.#complain(text, { again: () => this.#load(), label: "Go on from there" });
    }
    const isOld = error.code === "other_questions"; // to repeat the request cannot help
    const isUseless = isOld || error.code === "experts_changed";
    return this.#complain(error.message, { again: isUseless ? null : again, canForget: isOld });
  }

  #complain(text, { again = null, label = "Try again", canForget = false } = {}) {
    this.#again = again;
    id("fault").hidden = !text;
    id("fault-text").textContent = text;
    id("again").textContent = label;
    id("again").hidden = again === null;
    id("forget").hidden = !canForget;
  }

  #choose(choice) {
    if (choice === "stop") return this.#stop();
    if (id("card").hidden) return undefined;
    const { question } = this.#state;
    if (choice !== "back") return this.#run(() => answerQuestion(this.#user, question.id, choice, this.#num));
    const last = this.#state.last_answered;
    return last === null ? undefined : this.#run(() => takeBackAnswer(this.#user, last, this.#num));
  }

  #stop() {
    if (this.#isBusy && !this.#isStopping && !id("card").hidden) {
      this.#isStopping = true; // a second time closes the dialog even if the server does not answer
      return undefined;
    }
    if (id("card").hidden || !this.#state.num_answered) return dialog.close();
    this.#complain("");
    return this.#showResult();
  }

  #press(event) {
    event.stopPropagation(); // the page has keys of its own
    if (id("card").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = KEYS[event.key];
    if (!choice) return;
    event.preventDefault();
    if (!event.repeat) this.#choose(choice);
  }

  #use() {
    const { profile } = this.#state.estimate;
    const user = this.#user === this.#guest ? null : this.#user;
    const show = () => {
      dialog.close();
      this.#on.use(profile, user);
    };
    if (user === null) show();
    else this.#run(() => finishQuestions(user), show);
  }

  #more() {
    if (this.#state.done) this.#num = this.#state.num_answered + MORE;
    this.#load();
  }

  #delete() {
    const show = () => {
      this.#num = null;
      this.#show("start", "Find my taste");
      id("told").textContent = "Your answers are deleted.";
      id("user").focus();
    };
    this.#run(() => deleteAnswers(this.#user), show);
  }

  // ---- what is shown ----

  #show(view, title) {
    for (const name of ["start", "card", "result"]) id(name).hidden = name !== view;
    this.#complain("");
    id("bar").hidden = view !== "card";
    id("title").textContent = title;
  }

  #showState(state) {
    this.#state = state;
    const { question, num_questions: most, last_answered: last } = state;
    if (question === null || (this.#isStopping && state.num_answered)) {
      this.#showResult();
      return;
    }
    this.#show("card", `Question ${question.number} of ${most}`);
    id("bar").max = most;
    id("bar").value = question.number - 1;
    id("prompt").textContent = question.prompt;
    id("first").textContent = question.answers[0];
    id("second").textContent = question.answers[1];
    id("back").disabled = last === null;
    id("told").textContent = `${question.prompt} First answer: ${question.answers[0]} Second answer: ${question.answers[1]}`;
    id("texts").scrollTop = 0;
    id("title").focus();
  }

  #showResult() {
    const { estimate, done, num_answered: num } = this.#state;
    const { profile, agreement, notes, sentence } = estimate;
    this.#show("result", profile ? "What you prefer" : "Nothing is known yet");
    id("sentence").textContent = sentence;
    id("mixture").textContent = profile ? `Mixture: ${mixtureText(profile.weights)}` : "";
    id("guess").textContent = profile && agreement !== null ? guessText(agreement) : "";
    id("notes").replaceChildren(...notes.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    const isGuest = this.#user === this.#guest;
    id("saving").textContent = isGuest
      ? "You gave no name, so your answers are deleted when you leave this page."
      : `“Use these” also saves them as the profile “${this.#user}”.`;
    id("use").hidden = !profile;
    id("more").hidden = done && agreement === null; // every question was asked
    id("more").textContent = done ? `Ask ${MORE} more` : "Go on";
    id("delete-text").textContent = `Delete ${num === 1 ? "your answer" : `your ${num} answers`}? There is no way back.`;
    this.#confirm(false);
    id("told").textContent = "";
    id("title").focus();
  }

  #confirm(isAsking) {
    const wasAsking = !id("confirm").hidden;
    id("confirm").hidden = !isAsking;
    if (isAsking) id("keep").focus();
    else if (wasAsking) id("delete").focus();
  }
}

/** "More than 9", because an estimate is never certain. */
function guessText(agreement) {
  const right = Math.round(10 * agreement);
  return `We would guess ${right === 10 ? "more than 9" : right} of 10 of your choices.`;
}
