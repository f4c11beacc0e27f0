// The page: all images on one plane, drawn anew at every scale.

const $ = (id) => document.getElementById(id);
const [stage, canvas, marks] = [$("stage"), $("images"), $("marks")];
const sets = [];
// The set that is shown, its images on the plane (in native pixels), the names above them, where the plane lies in the
// canvas (in its pixels), and the image that is selected.
let set = null, plane = { width: 1, height: 1, places: [], names: [] }, view = { scale: 1, x: 0, y: 0 }, selected = 0;
// Whether all is in view and stays so.
let fitted = true;

// Drawing

// A quad for each image. Each pixel sums the Gaussians of its image in float32; one is three texels.
const VERTEX = `#version 300 es
layout(location = 0) in ivec4 quad;
layout(location = 1) in ivec2 run;
uniform vec2 size;
flat out ivec4 at;
void main() {
  vec2 corner = vec2(quad.xy) + vec2(gl_VertexID & 1, gl_VertexID >> 1) * vec2(quad.zw);
  gl_Position = vec4((2.0 * corner / size - 1.0) * vec2(1, -1), 0, 1);
  at = ivec4(max(quad.xy, 0), run);
}`;
const FRAGMENT = `#version 300 es
precision highp float;
precision highp int;
uniform highp sampler2D splats;
uniform vec2 size;
uniform int supersample;
uniform float cutoff;
flat in ivec4 at;
out vec4 color;
vec4 texel(int i) {
  int width = textureSize(splats, 0).x;
  return texelFetch(splats, ivec2(i % width, i / width), 0);
}
void main() {
  vec2 pixel = vec2(gl_FragCoord.x, size.y - gl_FragCoord.y) - vec2(at.xy);
  vec3 sum = vec3(0);
  for (int i = 0; i < at.w; i++) {
    vec4 box = texel(at.z + 3 * i);
    vec2 offset = pixel - box.xy;
    if (any(greaterThan(abs(offset), box.zw + 0.5))) continue;
    vec4 form = texel(at.z + 3 * i + 1);
    float weight = 0.0;
    for (int y = 0; y < supersample; y++) for (int x = 0; x < supersample; x++) {
      vec2 d = offset + (vec2(x, y) + 0.5) / float(supersample) - 0.5;
      vec2 q = vec2(form.x * d.x + form.y * d.y, form.z * d.y);
      float one = exp(-0.5 * dot(q, q));
      weight += one < cutoff ? 0.0 : one;
    }
    sum += weight * texel(at.z + 3 * i + 2).rgb;
  }
  vec3 mean = clamp(sum / float(supersample * supersample), 0.0, 1.0);
  color = vec4(at.w < 0 ? vec3(1, 0, 1) : mean, 1);
}`;
// Gaussians in one call, which bounds what is allocated, and samples of a pixel and axis: a set may ask for 64, which
// differ from 8 by nothing that a byte shows, and could hold up the whole screen.
const BATCH = 1 << 18, SAMPLES = 8, TEXTURE_WIDTH = 2048;

const gl = canvas.getContext("webgl2", { antialias: false });
if (gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) complain(new Error(gl.getProgramInfoLog(program)));
  gl.useProgram(program);
  gl.uniform = (name) => gl.getUniformLocation(program, name);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  for (const [location, size, from] of [[0, 4, 0], [1, 2, 16]]) {
    gl.enableVertexAttribArray(location);
    gl.vertexAttribIPointer(location, size, gl.INT, 24, from);
    gl.vertexAttribDivisor(location, 1);
  }
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) {
    gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
  }
  canvas.addEventListener("webglcontextlost", () => complain(new Refused("The graphics driver gave up; reload this page")));
}

/** Sets of pixels, and all sets where there is no WebGL 2, are magnified pixels. */
const magnified = () => !gl || !set.points;

function draw() {
  if (!set) return;
  const tiles = plane.places.map(tileOf).filter(
    (tile) => tile.left < canvas.width && tile.top < canvas.height && tile.left + tile.width > 0 && tile.top + tile.height > 0,
  );
  const pen = marks.getContext("2d");
  pen.clearRect(0, 0, marks.width, marks.height);
  if (gl) {
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT);
  }
  if (magnified()) {
    pen.imageSmoothingEnabled = false;
    for (const { i, left, top, width, height } of tiles) pen.drawImage(set.picture(i), left, top, width, height);
  } else {
    const count = Number($("points").value), most = Math.max(1, Math.floor(BATCH / Math.max(count, 1)));
    for (let from = 0; from < tiles.length; from += most) drawImages(tiles.slice(from, from + most), count);
  }
  annotate(pen, tiles);
  $("zoom").textContent = `${Number((view.scale / devicePixelRatio).toPrecision(view.scale < 10 ? 2 : 3))}×`;
}

/** A place of the plane as a rectangle of whole pixels of the canvas. */
function tileOf({ i, x, y }) {
  return {
    i,
    left: Math.round(x * view.scale + view.x),
    top: Math.round(y * view.scale + view.y),
    width: Math.max(1, Math.round(set.width * view.scale)),
    height: Math.max(1, Math.round(set.height * view.scale)),
  };
}

function drawImages(tiles, count) {
  const rows = Math.max(1, Math.ceil((3 * count * tiles.length) / TEXTURE_WIDTH));
  const texels = new Float32Array(4 * TEXTURE_WIDTH * rows), quads = new Int32Array(6 * tiles.length);
  tiles.forEach(({ i, left, top, width, height }, k) => {
    const image = set.image(i).subarray(0, NUMBERS * count), splats = toPixels(set, image, width, height);
    quads.set([left, top, width, height, 3 * count * k, splats ? count : -1], 6 * k);
    // Centers are counted from a corner in the canvas, or float32 would not be exact enough at large scales.
    const [x, y] = [Math.min(left, 0), Math.min(top, 0)];
    for (let j = 0, to = 12 * count * k; splats && j < count; j++, to += 12) {
      const [cx, cy, halfX, halfY, p, r, s] = splats.subarray(7 * j, 7 * j + 7);
      const [red, green, blue] = image.subarray(NUMBERS * j + 5, NUMBERS * j + 8);
      texels.set([cx + x, cy + y, Math.min(halfX, 1e9), Math.min(halfY, 1e9), p, r, s, 0, red, green, blue, 0], to);
    }
  });
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, TEXTURE_WIDTH, rows, 0, gl.RGBA, gl.FLOAT, texels);
  gl.bufferData(gl.ARRAY_BUFFER, quads, gl.STREAM_DRAW);
  gl.uniform2f(gl.uniform("size"), canvas.width, canvas.height);
  gl.uniform1i(gl.uniform("supersample"), Math.min(set.supersample, SAMPLES));
  gl.uniform1f(gl.uniform("cutoff"), set.cutoff);
  gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, tiles.length);
}

/** Names of classes, the frame of the selected image, ellipses. */
function annotate(pen, tiles) {
  const style = getComputedStyle(marks), size = Math.min(0.75 * plane.band * view.scale, 14 * devicePixelRatio);
  if (size >= 7 * devicePixelRatio) {
    pen.fillStyle = style.color;
    pen.font = `${size}px ${style.fontFamily}`;
    pen.textBaseline = "bottom";
    for (const { text, x, y, width } of plane.names) {
      pen.fillText(text, x * view.scale + view.x, y * view.scale + view.y - 0.2 * size, width * view.scale);
    }
  }
  if ($("ellipses").checked && !magnified()) drawEllipses(pen, tiles);
  for (const { left, top, width, height } of tiles.filter((tile) => tile.i === selected)) {
    pen.strokeStyle = style.caretColor;
    pen.lineWidth = 2 * devicePixelRatio;
    pen.strokeRect(left - pen.lineWidth, top - pen.lineWidth, width + 2 * pen.lineWidth, height + 2 * pen.lineWidth);
  }
}

/** One standard deviation of each Gaussian, dashed where it takes light away, on a dark line to be seen on all colors. */
function drawEllipses(pen, tiles) {
  const count = Number($("points").value);
  for (const { i, left, top, width, height } of tiles) {
    const paths = { light: new Path2D(), dark: new Path2D() }, image = set.image(i);
    for (let at = 0; at < NUMBERS * count; at += NUMBERS) {
      const [x, y, l11, l21, l22, red, green, blue] = image.subarray(at, at + NUMBERS);
      const [growX, growY] = [width / set.width, height / set.height], circle = new Path2D();
      circle.arc(0, 0, 1, 0, 2 * Math.PI);
      const [cx, cy] = [left + (width / 2) * (x + 1), top + (height / 2) * (y + 1)];
      const numbers = [growX * l11, growY * l21, 0, growY * l22, cx, cy];
      if (numbers.every(Number.isFinite)) {
        paths[red + green + blue < 0 ? "dark" : "light"].addPath(circle, new DOMMatrix(numbers));
      }
    }
    pen.save();
    pen.beginPath();
    pen.rect(left, top, width, height);
    pen.clip();
    for (const [name, color] of [["light", "#fff"], ["dark", "#ff8a70"]]) {
      for (const [line, wide] of [["rgb(0 0 0 / 0.6)", 2.6], [color, 1.3]]) {
        pen.strokeStyle = line;
        pen.lineWidth = wide * devicePixelRatio;
        pen.setLineDash(name === "dark" && wide < 2 ? [5 * devicePixelRatio, 4 * devicePixelRatio] : []);
        pen.stroke(paths[name]);
      }
    }
    pen.restore();
  }
}

let asked = 0;

function redraw() {
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(draw);
}

// The plane

/** Places the images of the classes that are chosen, each class in a block, so that all are as large as they can be. */
function arrange(band = 0.6 * Math.max(set.width, set.height)) {
  const { width: w, height: h, perClass } = set, gap = Math.max(w, h) / 10;
  const chosen = $("classes").value === "" ? [...set.classNames.keys()] : [Number($("classes").value)];
  let best = { scale: 0 };
  for (let across = 1; across <= Math.min(chosen.length, 64); across++) {
    for (let columns = 1; columns <= Math.min(perClass, 256); columns++) {
      const block = { width: columns * (w + gap) + 3 * gap, height: Math.ceil(perClass / columns) * (h + gap) + band + gap };
      const [width, height] = [across * block.width - 4 * gap, Math.ceil(chosen.length / across) * block.height - 2 * gap];
      const scale = Math.min(canvas.width / (width + 4 * gap), canvas.height / (height + 4 * gap));
      if (scale > best.scale) best = { scale, across, columns, block, width, height };
    }
  }
  // Once more where their names would be too small to read.
  const least = (15 * devicePixelRatio) / best.scale;
  if (band < 0.9 * least) return arrange(least);
  plane = { ...best, band, places: [], names: [] };
  chosen.forEach((label, k) => {
    const x = (k % best.across) * best.block.width, y = Math.floor(k / best.across) * best.block.height + band;
    plane.names.push({ text: set.classNames[label].slice(0, 60), x, y, width: best.block.width - 4 * gap });
    for (let j = 0; j < perClass; j++) {
      const [column, row] = [j % best.columns, Math.floor(j / best.columns)];
      plane.places.push({ i: label * perClass + j, x: x + column * (w + gap), y: y + row * (h + gap) });
    }
  });
}

function fit() {
  arrange();
  view = { scale: plane.scale, x: 0, y: 0 };
  fitted = true;
  center(plane.width / 2, plane.height / 2);
}

function center(x, y) {
  view.x = canvas.width / 2 - x * view.scale;
  view.y = canvas.height / 2 - y * view.scale;
  redraw();
}

/** Magnifies around a point of the canvas, in its pixels. */
function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
  const side = Math.max(set.width, set.height);
  const scale = Math.min(Math.max(view.scale * factor, Math.min(plane.scale, 1)), (1 << 16) / side);
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  move(0, 0);
}

/** Moves the plane, not out of sight. */
function move(dx, dy) {
  const keep = (at, length, size) => Math.min(Math.max(at, size / 2 - length), size / 2);
  view.x = keep(view.x + dx, plane.width * view.scale, canvas.width);
  view.y = keep(view.y + dy, plane.height * view.scale, canvas.height);
  fitted = false;
  redraw();
}

/** Fills the view with the selected image, at a whole number of pixels for each of its own. */
function fill() {
  const scale = 0.92 * Math.min(canvas.width / set.width, canvas.height / set.height);
  view.scale = scale > 1 ? Math.floor(scale) : scale;
  fitted = false;
  show(plane.places.find((place) => place.i === selected), true);
}

function show(place, always) {
  const { left, top, width, height } = tileOf(place);
  const inside = left >= 0 && top >= 0 && left + width <= canvas.width && top + height <= canvas.height;
  if (!inside || always) center(place.x + set.width / 2, place.y + set.height / 2);
  redraw();
}

function select(place) {
  if (!place) return;
  selected = place.i;
  show(place, false);
  describe();
  weigh(set, selected).then(showBytes);
}

/** The image beside the selected one: the next or the last one before, or the nearest in the rows above or below. */
function neighbor(dx, dy) {
  const at = plane.places.findIndex((place) => place.i === selected), from = plane.places[at];
  if (dx) return plane.places[at + dx];
  const away = (place) => (place.y - from.y) * dy;
  const beyond = plane.places.filter((place) => away(place) > 0);
  const distance = (place) => away(place) + Math.abs(place.x - from.x) / 1e3 + (Math.abs(place.x - from.x) > set.width ? 1e6 : 0);
  return beyond.reduce((best, place) => (best && distance(best) <= distance(place) ? best : place), null);
}

// What is said of it

const digits = (number) => number.toLocaleString("en");

function describe() {
  const [label, number] = [Math.floor(selected / set.perClass), (selected % set.perClass) + 1];
  $("status").textContent = `${set.classNames[label]}, image ${number} of ${set.perClass}`;
  $("of_class").textContent = set.classNames[label];
}

function showBytes() {
  const first = selected - (selected % set.perClass);
  const sum = (from, count) => {
    let total = 0;
    for (let i = from; i < from + count; i++) total += set.png[i];
    return Number.isNaN(total) ? "…" : digits(total);
  };
  $("set_bytes").textContent = digits(set.bytes);
  $("class_bytes").textContent = digits(Math.round(set.bytes / set.classes));
  $("image_bytes").textContent = digits(Math.round(set.bytes / set.count));
  $("set_png").textContent = sum(0, set.count);
  $("class_png").textContent = sum(first, set.perClass);
  $("image_png").textContent = sum(selected, 1);
}

function picture(own, i) {
  const surface = document.createElement("canvas");
  [surface.width, surface.height] = [own.width, own.height];
  const pen = surface.getContext("2d", { alpha: false });
  pen.putImageData(new ImageData(rasterize(own, i), own.width, own.height), 0, 0);
  return surface;
}

async function weigh(own, i) {
  if (Number.isNaN(own.png[i])) {
    const blob = await new Promise((done) => picture(own, i).toBlob(done, "image/png"));
    own.png[i] = blob.size;
  }
}

async function weighAll(own) {
  for (let i = 0; i < own.count && set === own; i++) {
    await weigh(own, i);
    if (set === own && (i % 20 === 0 || i === own.count - 1)) showBytes();
  }
}

// Sets

function choose(own) {
  set = own;
  selected = 0;
  $("sets").value = sets.indexOf(own);
  $("name").textContent = own.name;
  const size = `${own.height} × ${own.width}${own.channels === 1 ? ", gray" : ""}`;
  const points = own.points ? `, ${own.points} Gaussians each` : "";
  const kind = own.codec.replace("_", " ");
  $("facts").textContent = `${kind}: ${own.classes} classes × ${own.perClass} images of ${size}${points}`;
  $("of_labels").textContent = own.labels ? `distilled, with ${digits(own.labels)} of labels` : "distilled";
  $("classes").replaceChildren(new Option("all", ""), ...own.classNames.map((name, label) => new Option(name, label)));
  $("slider").hidden = $("outlines").hidden = magnified();
  $("points").max = $("points").value = own.points;
  $("counted").textContent = own.points;
  own.picture ??= remembered((i) => picture(own, i));
  own.png ??= new Float64Array(own.count).fill(NaN);
  fit();
  describe();
  showBytes();
  setTimeout(weighAll, 300, own);
}

function complain(error) {
  $("error").textContent = error instanceof Refused ? error.message : `This cannot be shown: ${error.message}`;
  $("error").hidden = false;
}

async function add(manifest, arrays) {
  const own = await readSet(manifest, arrays);
  $("sets").append(new Option(own.name, sets.push(own) - 1));
  return own;
}

/** Opens the set among files; browsers read no folders for a page on disk. */
async function open(files) {
  try {
    const found = [...files], manifest = found.find(({ name }) => name === MANIFEST);
    const arrays = found.find(({ name }) => /^synset(-[0-9a-f]{12})?\.safetensors$/.test(name));
    if (!manifest || !arrays) {
      const names = found.slice(0, 4).map(({ name }) => name).join(", ") || "neither";
      refuse(`Expected a set, ${MANIFEST} and ${ARRAYS} together; found ${names}`);
    }
    const contents = [manifest, arrays].map(async (file) => new Uint8Array(await file.arrayBuffer()));
    choose(await add(...(await Promise.all(contents))));
    $("error").hidden = true;
  } catch (error) {
    complain(error);
  }
}

// Events

$("sets").onchange = () => choose(sets[$("sets").value]);
$("files").onchange = async () => {
  await open($("files").files);
  $("files").value = "";
};
$("classes").onchange = () => {
  fit();
  if (!plane.places.some(({ i }) => i === selected)) select(plane.places[0]);
};
$("points").oninput = () => {
  $("counted").textContent = $("points").value;
  redraw();
};
$("ellipses").onchange = redraw;
$("fit").onclick = fit;
$("in").onclick = () => zoom(1.5);
$("out").onclick = () => zoom(1 / 1.5);

document.ondragover = (event) => {
  event.preventDefault();
  stage.classList.add("drop");
};
document.ondragleave = (event) => event.relatedTarget ?? stage.classList.remove("drop");
document.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("drop");
  open(event.dataTransfer.files);
};

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
document.onkeydown = (event) => {
  if (!set || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, button")) return;
  const keys = { Enter: fill, Escape: fit, "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5) };
  keys.e = keys.E = () => $("ellipses").click();
  if (event.key in STEPS) select(neighbor(...STEPS[event.key]));
  else if (Object.hasOwn(keys, event.key)) keys[event.key]();
  else return;
  event.preventDefault();
};

const pointers = new Map();
let travelled = 0;

function place(event) {
  const box = marks.getBoundingClientRect();
  return { x: (event.clientX - box.left) * devicePixelRatio, y: (event.clientY - box.top) * devicePixelRatio };
}

function imageAt({ x, y }) {
  return plane.places.find((one) => {
    const { left, top, width, height } = tileOf(one);
    return x >= left && x < left + width && y >= top && y < top + height;
  });
}

marks.onpointerdown = (event) => {
  marks.setPointerCapture(event.pointerId);
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, place(event));
};
marks.onpointermove = (event) => {
  const before = pointers.get(event.pointerId), now = place(event);
  if (!before) return;
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  travelled += Math.hypot(now.x - before.x, now.y - before.y);
  pointers.set(event.pointerId, now);
  // A finger that trembles selects.
  if (travelled < 5 * devicePixelRatio) return;
  if (other) {
    const [was, is] = [before, now].map((point) => Math.max(Math.hypot(point.x - other.x, point.y - other.y), 1));
    zoom(is / was, (now.x + other.x) / 2, (now.y + other.y) / 2);
  }
  // Half of it with two fingers, whose middle moves.
  const part = other ? 0.5 : 1;
  move(part * (now.x - before.x), part * (now.y - before.y));
};
marks.onpointerup = marks.onpointercancel = (event) => {
  if (event.type === "pointerup" && pointers.size === 1 && travelled < 5 * devicePixelRatio) select(imageAt(place(event)));
  pointers.delete(event.pointerId);
};
marks.ondblclick = (event) => (imageAt(place(event)) ? fill() : fit());
marks.addEventListener("wheel", (event) => {
  // Within another page the wheel is that page's.
  if (window !== top && !event.ctrlKey) return;
  event.preventDefault();
  const { x, y } = place(event), lines = event.deltaMode === 1 ? 16 : 1;
  zoom(2 ** ((-event.deltaY * lines * (event.ctrlKey ? 4 : 1)) / 400), x, y);
}, { passive: false });

new ResizeObserver(() => {
  for (const one of [canvas, marks]) {
    one.width = Math.max(1, Math.round(stage.clientWidth * devicePixelRatio));
    one.height = Math.max(1, Math.round(stage.clientHeight * devicePixelRatio));
  }
  if (set && fitted) fit();
  // Now: a canvas that was resized is empty.
  draw();
}).observe(stage);
matchMedia("(prefers-color-scheme: dark)").onchange = redraw;

(async () => {
  try {
    for (const { manifest, arrays } of JSON.parse($("embedded").textContent)) {
      await add(new TextEncoder().encode(manifest), Uint8Array.from(atob(arrays), (byte) => byte.charCodeAt(0)));
    }
    if (sets.length) choose(sets.find(({ name }) => name === decodeURIComponent(location.hash.slice(1))) ?? sets[0]);
  } catch (error) {
    complain(error);
  }
})();
