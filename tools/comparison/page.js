(() => {
  const find = (id) => document.getElementById(id);
  const figures = JSON.parse(find("figures").textContent);

  // colors are names of CSS variables, which the two schemes give different values
  function resolve(value, style) {
    if (typeof value === "string") {
      return value.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    }
    if (Array.isArray(value)) return value.map((one) => resolve(one, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, resolve(one, style)]));
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const place of document.querySelectorAll("[data-figure]")) {
      const { data, layout } = resolve(figures[place.dataset.figure], style);
      Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
    }
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const shots = [...document.querySelectorAll(".shot")];
  const which = find("which"), stage = find("stage"), divider = find("divider");
  const current = () => shots[which.value - 1];
  const view = (name) => current().querySelector(`[data-view="${name}"]`);

  function show() {
    for (const shot of shots) {
      shot.classList.toggle("current", shot === current());
      shot.classList.toggle("over", !stage.hidden);
    }
    which.setAttribute("aria-valuetext", current().querySelector("h3").textContent.trim());
    current().append(stage);
    for (const side of ["left", "right"]) {
      const from = view(find(side).value), to = find(`${side}-view`);
      to.src = from.src;
      to.alt = from.alt;
    }
  }

  function move(step) {
    which.value = Number(which.value) + step; // the slider keeps it within its range
    show();
  }

  function choose(over) {
    stage.hidden = !over;
    find("side").setAttribute("aria-pressed", !over);
    find("over").setAttribute("aria-pressed", over);
    show();
  }

  function divide() {
    document.querySelector(".pair").style.setProperty("--at", `${divider.value}%`);
  }

  for (const [side, first] of [["left", "plain"], ["right", "distilled"]]) {
    for (const picture of shots[0].querySelectorAll("[data-view]")) {
      find(side).add(new Option(picture.dataset.view));
    }
    find(side).value = first;
    find(side).addEventListener("change", show);
  }
  which.addEventListener("input", show);
  find("before").addEventListener("click", () => move(-1));
  find("after").addEventListener("click", () => move(1));
  find("side").addEventListener("click", () => choose(false));
  find("over").addEventListener("click", () => choose(true));
  divider.addEventListener("input", divide);
  document.querySelector(".pair").addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && event.buttons === 0) return;
    const box = event.currentTarget.getBoundingClientRect();
    divider.value = (100 * (event.clientX - box.left)) / box.width;
    divide();
  });
  document.querySelector(".pair").addEventListener("pointerdown", (event) => event.preventDefault());
  show();
})();
