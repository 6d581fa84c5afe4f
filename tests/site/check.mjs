// Opens every page of a built site in headless Chromium, on a desktop in light colours and on a phone in dark ones: no error on the
// console, nothing missing, no request to another server, no page wider than the phone, and no serious finding of axe-core. Then it
// tries the search, and the filter of the history.
//
//     node tests/site/check.mjs docs/_build/html [more pages.html ...]
//
// $CHROMIUM names another browser.

import { createServer } from "node:http";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { extname, join, relative, resolve, sep } from "node:path";
import axe from "axe-core";
import puppeteer from "puppeteer-core";

const SCREENS = [
  { name: "desktop", width: 1280, height: 800, scheme: "light" },
  { name: "phone", width: 390, height: 844, scheme: "dark", isMobile: true, hasTouch: true },
];
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".json": "application/json" };

/** Serves a folder, and single files under /other/, on a port that the system picks. */
async function serve(site, others) {
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const other = path.match(/^\/other\/(\d+)\.html$/);
    try {
      const file = other ? others[other[1]] : join(site, path);
      const content = readFileSync(file);
      response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" });
      response.end(content);
    } catch {
      response.writeHead(path === "/favicon.ico" ? 204 : 404); // browsers ask for it by themselves
      response.end();
    }
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  return server;
}

function htmlFiles(site) {
  return readdirSync(site, { recursive: true })
    .filter((path) => path.endsWith(".html") && statSync(join(site, path)).isFile())
    .sort();
}

/** Opens a tab and collects its errors in a list. */
async function tab(browser, screen, problems) {
  const page = await browser.newPage();
  await page.setViewport(screen);
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: screen.scheme }]);
  page.on("console", (message) => message.type() === "error" && problems.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  page.on("request", (request) => /^(data:|http:\/\/127\.0\.0\.1:)/.test(request.url()) || problems.push(`asks another server: ${request.url()}`));
  page.on("requestfailed", (request) => problems.push(`not loaded: ${request.url()} ${request.failure()?.errorText}`));
  page.on("response", (response) => response.status() >= 400 && problems.push(`${response.status()}: ${response.url()}`));
  return page;
}

/** Lists the elements beyond the right edge of a page that is wider than its window. */
function tooWide() {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const wide = [...document.body.querySelectorAll("*")].filter((element) => element.getBoundingClientRect().right > width + 1);
  const names = wide.slice(0, 3).map((element) => element.outerHTML.slice(0, 80));
  return [`${document.documentElement.scrollWidth} wide in a window of ${width}: ${names.join(" | ")}`];
}

async function accessibility(page) {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => window.axe.run());
  return violations
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, help, nodes }) => `axe ${id} (${help}), ${nodes.length} times: ${nodes[0].html.slice(0, 120)} ${nodes[0].any[0]?.message ?? ""}`);
}

async function searchProblems(browser, base) {
  const problems = [];
  const page = await tab(browser, SCREENS[0], problems);
  await page.goto(`${base}/index.html`, { waitUntil: "load" });
  await page.type("input[name=q]", "save_percent");
  await Promise.all([page.waitForNavigation(), page.keyboard.press("Enter")]);
  const found = "#search-results ul.search li a";
  await page.waitForSelector(found, { timeout: 20_000 }).catch(() => problems.push("the search for save_percent finds nothing"));
  const first = await page.$eval(found, (link) => link.href).catch(() => "");
  if (!(await page.goto(first).catch(() => null))?.ok()) problems.push(`the first result cannot be opened: ${first}`);
  await page.close();
  return problems;
}

/** Types into the filter of the list of benchmarks: only the rows with all words may stay visible. */
async function filterProblems(browser, base) {
  const problems = [];
  const page = await tab(browser, SCREENS[0], problems);
  await page.goto(`${base}/history.html`, { waitUntil: "load" });
  const rows = () => page.$$eval("table.searchable tbody tr:not([hidden])", (found) => found.map((row) => row.textContent));
  const all = await rows();
  await page.type("input[type=search]:not([name])", "mlp BFLOAT16");
  const left = await rows();
  const expected = all.filter((text) => /mlp/i.test(text) && /bfloat16/i.test(text));
  if (!left.length || left.length === all.length || left.join() !== expected.join())
    problems.push(`the filter shows ${left.length} of ${all.length} rows, ${expected.length} have the words`);
  await page.close();
  return problems;
}

async function main(folder, ...extra) {
  const site = resolve(folder);
  const server = await serve(site, extra.map((path) => resolve(path)));
  const base = `http://127.0.0.1:${server.address().port}`;
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-dev-shm-usage"],
  });
  const pages = htmlFiles(site).map((path) => [path, `${base}/${path.split(sep).map(encodeURIComponent).join("/")}`]);
  pages.push(...extra.map((path, index) => [relative(".", path), `${base}/other/${index}.html`]));
  let failed = 0;
  const report = (where, problems) => {
    for (const problem of new Set(problems)) console.log(`${where}: ${problem}`);
    failed += problems.length ? 1 : 0;
  };
  try {
    for (const screen of SCREENS) {
      for (const [path, url] of pages) {
        const problems = [];
        const page = await tab(browser, screen, problems);
        await page.goto(url, { waitUntil: "load", timeout: 60_000 });
        await new Promise((settled) => setTimeout(settled, 200)); // for scripts that begin when the page has loaded
        problems.push(...(await page.evaluate(tooWide)));
        problems.push(...(await accessibility(page)));
        report(`${screen.name} ${path}`, problems);
        await page.close();
      }
    }
    report("search", await searchProblems(browser, base));
    report("history", await filterProblems(browser, base));
  } finally {
    await browser.close();
    server.close();
  }
  console.log(`${pages.length} pages on ${SCREENS.length} screens, ${failed} with findings`);
  process.exitCode = failed || !pages.length ? 1 : 0;
}

await main(...process.argv.slice(2));
