"use strict";
// Unpacks Plotly, draws the plots, and gets the page ready for paper. `data-plots` on <html> says how many were drawn.
(() => {
  const root = document.documentElement;
  const block = (id) => document.getElementById(id).textContent;
  const options = { responsive: true, displayModeBar: false };
  const finger = matchMedia("(pointer: coarse)").matches; // moves the page, not what a plot shows of its range
  const drawn = [];

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  async function draw() {
    const figures = JSON.parse(block("figures"));
    if (figures.length && !window.DecompressionStream) throw new Error("this browser cannot unpack them (no DecompressionStream)");
    if (figures.length) {
      const script = document.createElement("script");
      script.textContent = await unpack(block("plotly-js"));
      document.head.append(script);
    }
    for (const figure of figures) {
      const place = document.getElementById(`plot-${figure.name}`);
      place.textContent = "";
      const layout = finger ? { ...figure.layout, dragmode: false } : figure.layout;
      await Plotly.newPlot(place, figure.data, layout, options);
      drawn.push(place);
    }
    root.dataset.plots = drawn.length;
  }

  draw().catch((error) => {
    root.dataset.plots = "failed";
    for (const place of document.querySelectorAll(".plot:not(.js-plotly-plot)")) place.textContent = `The plots cannot be drawn: ${error.message}.`;
  });

  // On paper everything is open, and no plot is wider than the sheet.
  const PAPER = 660;
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
    for (const place of drawn) Plotly.relayout(place, { width: PAPER });
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
    for (const place of drawn) Plotly.relayout(place, { width: null, autosize: true });
  });
})();
