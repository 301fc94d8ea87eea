"use strict"
// Texts of the catalogue and of users are data: they go in by textContent only.
const LEVELS = {1: "pseudo-exposure", 2: "exposure", 3: "click", 4: "purchase"}
const SOURCES = ["fresh", "stored", "stale", "popular", "fallback"], HITS = SOURCES.slice(0, 3)
const EVERY_MS = 2000, POINTS = 150, MINUTE = 30  // polls
const FRESH_EVERY_MS = 100, FRESH_TRIES = 80, SHOWN_EVENTS = 200
const at = id => document.getElementById(id)
const polls = []
let hovered = null

function make(name, text, className) {
  const made = document.createElement(name)
  if (className) made.className = className
  made.textContent = text
  return made
}

async function call(path, body) {
  const headers = body ? {"Content-Type": "application/json"} : {}
  if (at("token").value) headers.Authorization = "Bearer " + at("token").value
  const answer = await fetch(path, body ? {method: "POST", headers, body: JSON.stringify(body)} : {headers})
  const value = await answer.json().catch(() => ({what: `the service answers ${answer.status}`}))
  if (!answer.ok) throw new Error([value.what, value.mend].filter(Boolean).join(": "))
  return value
}

function say(text, wrong = false) {
  at("note").hidden = !text
  at("note").textContent = text
  at("note").className = wrong ? "wrong" : ""
}

// What is asked for

function rows(id, entries, empty) {
  at(id).replaceChildren(...entries.map(({rank, title, name, value, level}) => {
    const row = make("li", ""), label = make("span", title || name, "name")
    if (title) label.append(make("small", name))
    label.title = title || name
    row.append(make("span", rank, "rank"), label, make("span", value, "value" + (level ? " l" + level : "")))
    return row
  }), ...entries.length ? [] : [make("li", empty, "empty")])
}

const age = seconds => seconds < 120 ? seconds.toFixed(seconds < 10 ? 1 : 0) + " s" : seconds < 7200 ? (seconds / 60).toFixed(0) + " min" : (seconds / 3600).toFixed(0) + " h"
const path = () => "/v1/users/" + encodeURIComponent(at("user").value)

let asked = 0  // an answer to an earlier question may come after that to the latest one: it is not shown

async function showSlate() {
  const own = asked, slate = await call(path() + "/slate?k=" + at("k").value)
  if (own !== asked) return slate
  rows("slate", slate.items.map((item, place) => ({rank: place + 1, title: item.title, name: item.item_id, value: item.score.toFixed(3)})),
    "There is nothing to show.")
  at("source").hidden = false
  at("source").textContent = slate.source
  at("source").className = "tag " + slate.source
  at("age").textContent = slate.source === "fallback" ? "" : age(slate.age_s) + " old"
  at("version").textContent = slate.model_version || "–"
  return slate
}

async function showHistory() {
  const own = asked, {events} = await call(path() + "/history"), latest = events.slice(-SHOWN_EVENTS).reverse()
  if (own !== asked) return
  rows("history", latest.map((event, place) => ({
    rank: place + 1, title: event.title, name: event.item_id, value: LEVELS[event.level], level: event.level
  })), "Nothing is known of this user.")
  at("events").textContent = events.length > latest.length ? `latest ${latest.length} of ${events.length}` : events.length ? `${events.length} events, latest first` : ""
}

async function show() {
  asked++
  for (const chip of at("chips").children) chip.setAttribute("aria-pressed", chip.textContent === at("user").value)
  location.hash = "user=" + encodeURIComponent(at("user").value)
  const [slate] = await Promise.all([showSlate(), showHistory()])
  return slate
}

async function trigger() {
  const before = (await show()).computed_at
  await call("/v1/requests", {user_id: at("user").value})
  const start = performance.now()
  for (let tries = 0; tries < FRESH_TRIES; tries++) {
    const slate = await showSlate()
    if (slate.source === "fresh" && slate.computed_at > before) return say(`A fresh slate after ${Math.round(performance.now() - start)} ms.`)
    await new Promise(done => setTimeout(done, FRESH_EVERY_MS))
  }
  say("The fresh slate is not there yet; see Metrics for why.", true)
}

async function offer() {
  const {user_ids} = await call("/v1/users?limit=12")
  at("users").replaceChildren(...user_ids.map(id => Object.assign(document.createElement("option"), {value: id})))
  at("chips").replaceChildren(...user_ids.map(id => {
    const chip = make("button", id)
    chip.type = "button"
    chip.addEventListener("click", guarded(() => { at("user").value = id; return show() }))
    return chip
  }))
  return user_ids
}

// Charts

function drawn(name, attributes, text) {
  const made = document.createElementNS(at("hits").namespaceURI, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  if (text !== undefined) made.textContent = text
  return made
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value))
  return [1, 2, 5, 10].map(step => step * power).find(top => top >= value)
}

function chart(id, lines, {top, format}) {
  const svg = at(id), width = svg.clientWidth, height = svg.clientHeight, left = 48, right = width - 12, bottom = height - 20, head = 10
  const x = place => right - (polls.length - 1 - place) * (right - left) / (POINTS - 1)
  const y = value => bottom - (bottom - head) * Math.min(value / top, 1)
  const parts = []
  for (const share of [0, .5, 1]) {
    parts.push(drawn("line", {class: "grid", x1: left, x2: right, y1: y(share * top), y2: y(share * top)}))
    parts.push(drawn("text", {x: left - 8, y: y(share * top) + 4, "text-anchor": "end"}, format(share * top)))
  }
  const minutes = POINTS * EVERY_MS / 60000
  parts.push(drawn("text", {x: left, y: height - 3}, `${minutes} min ago`), drawn("text", {x: right, y: height - 3, "text-anchor": "end"}, "now"))
  for (const {values, className} of lines) {
    let d = ""
    values.forEach((value, place) => { if (value !== null) d += (d && values[place - 1] !== null ? "L" : "M") + x(place).toFixed(1) + " " + y(value).toFixed(1) })
    parts.push(drawn("path", {class: className, d}))
    const last = values.length - 1
    if (last >= 0 && values[last] !== null) parts.push(drawn("circle", {class: className, cx: x(last), cy: y(values[last]), r: 4}))
  }
  const place = hovered && hovered.id === id ? Math.round(polls.length - 1 - (right - hovered.x) * (POINTS - 1) / (right - left)) : -1
  if (place >= 0 && place < polls.length && lines[0].values[place] !== null) {
    const anchor = x(place) > (left + right) / 2 ? "end" : "start"
    parts.push(drawn("line", {class: "cursor", x1: x(place), x2: x(place), y1: head, y2: bottom}))
    const told = lines.map(line => format(line.values[place])).join(" · ")
    parts.push(drawn("text", {class: "tip", x: x(place) + (anchor === "end" ? -6 : 6), y: head + 12, "text-anchor": anchor}, told))
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`)
  svg.replaceChildren(...parts)
}

function ratio(place) {  // of the minute up to a poll; null where nothing was asked for
  const now = polls[place].by_source, then = polls[Math.max(place - MINUTE, 0)].by_source
  const counts = SOURCES.map(source => Math.max((now[source] || 0) - (then[source] || 0), 0)), total = counts.reduce((a, b) => a + b, 0)
  return total ? HITS.reduce((sum, source) => sum + counts[SOURCES.indexOf(source)], 0) / total : null
}

const short = (value, digits) => String(Number(value.toFixed(digits)))  // without zeros behind the point
const percent = value => short(100 * value, 1) + " %"
const ms = value => value === null ? "–" : short(value, value < 10 ? 1 : 0) + " ms"

function draw() {
  const hits = polls.map((_, place) => ratio(place)), p99 = polls.map(poll => poll.latency_p99_ms), p50 = polls.map(poll => poll.latency_p50_ms)
  chart("hits", [{values: hits, className: "a"}], {top: 1, format: percent})
  chart("latency", [{values: p99, className: "a"}, {values: p50, className: "b"}],
    {top: niceTop(Math.max(...p99.map(value => value || 0), 1)), format: ms})
  const {by_source: counts, hit_ratio} = polls.at(-1), now = hits.at(-1)
  at("hits-now").textContent = now !== null ? percent(now) : hit_ratio !== null ? percent(hit_ratio) : "–"
  at("hits-when").textContent = "slates of their own, " + (now !== null ? "last minute" : "since the start")
  at("latency-now").textContent = ms(p99.at(-1))
  at("p99").textContent = ms(p99.at(-1))
  at("p50").textContent = ms(p50.at(-1))
  const present = SOURCES.filter(source => counts[source])
  at("share").replaceChildren(...present.map(source => Object.assign(make("span", "", source + "-fill"), {title: `${source} ${counts[source]}`})))
  present.forEach((source, place) => { at("share").children[place].style.flex = counts[source] + " 1 0" })
  at("sources").replaceChildren(...present.map(source => {
    const entry = make("li", "")
    entry.append(make("i", "", source + "-fill"), source + " ", make("b", counts[source].toLocaleString("en")))
    return entry
  }))
}

async function watch() {
  try {
    const stats = await call("/v1/stats")
    polls.push(stats)
    if (polls.length > POINTS) polls.shift()
    at("version").textContent = stats.model_version || at("version").textContent
    at("replicas").textContent = stats.replicas
    at("uptime").textContent = age(stats.uptime_s)
    at("dot").className = "good"
    at("state").textContent = "live"
    draw()
  } catch (error) {
    at("dot").className = "wrong"
    at("state").textContent = "the service does not answer"
  }
  setTimeout(watch, EVERY_MS)
}

const guarded = action => event => {
  event.preventDefault()
  say("")
  return action().catch(error => say(error.message, true))
}

async function begin() {
  const asked = new URLSearchParams(location.hash.slice(1)).get("user")
  const needsToken = document.body.dataset.token === "yes"
  at("secret").hidden = !needsToken
  const users = needsToken ? [] : await offer().catch(() => [])
  at("user").value = asked || users[0] || ""
  if (at("user").value) await show()
}

at("ask").addEventListener("submit", guarded(show))
at("token").addEventListener("change", guarded(offer))
at("trigger").addEventListener("click", event => at("ask").reportValidity() && guarded(trigger)(event))
for (const id of ["hits", "latency"]) {
  at(id).addEventListener("pointermove", event => { hovered = {id, x: event.offsetX}; if (polls.length) draw() })
  at(id).addEventListener("pointerleave", () => { hovered = null; if (polls.length) draw() })
}
addEventListener("resize", () => polls.length && draw())
watch()
begin().catch(error => say(error.message, true))
