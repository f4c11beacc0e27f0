"use strict";

// A distilled set, from its two files to Gaussians to pixels. The file format is that of docs/exchange.md, what is
// drawn that of gsdd_jax/decode_numpy.py; numbers are checked before they are used, for a set comes from anyone.

const [MANIFEST, ARRAYS] = ["manifest.json", "synset.safetensors"];
const HEADER_BYTES = 1 << 16, VALUES = 1 << 24, SORTED_POINTS = 1 << 12;
const PREFILTER = 1 / 12, MAX_PIXELS = 1e6, FINEST_STEP = 2 ** -16;
const ITEM_BYTES = new Map(Object.entries({ U8: 1, BF16: 2, F32: 4 }));
// What a Gaussian takes in an image: x, y in [-1, 1]; l11, l21, l22 in native pixels; red, green, blue.
const NUMBERS = 8;

/** What a person can put right; the message is one line. */
class Refused extends Error {}

function refuse(text) {
  throw new Refused(text);
}

function shown(value) {
  const text = JSON.stringify(value) ?? "nothing";
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
}

function integer(object, key, least, most, name = key) {
  const value = object[key];
  if (!Number.isInteger(value) || value < least || value > most) {
    refuse(`${MANIFEST}: ${name}: expected an integer from ${least} to ${most}, found ${shown(value)}`);
  }
  return value;
}

function record(value, file, name) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    refuse(`${file}: ${name}: expected an object, found ${shown(value)}`);
  }
  return value;
}

function parseJson(bytes, file) {
  const text = new TextDecoder().decode(bytes);
  try {
    return JSON.parse(text);
  } catch {
    try {
      // A run that diverged records numbers that JSON does not have.
      return JSON.parse(text.replace(/(?<![\w"])(NaN|-?Infinity)(?![\w"])/g, "null"));
    } catch (error) {
      return refuse(`${file}: damaged (${error.message})`);
    }
  }
}

/** Reads a safetensors file: a map from names to {dtype, shape, data}; the arrays must fill it, one behind the other. */
function readArrays(bytes) {
  const length = bytes.length < 8 ? 0 : Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const start = 8 + length;
  if (bytes.length < 8 || length > HEADER_BYTES || start > bytes.length) {
    refuse(`${ARRAYS}: damaged (${bytes.length} bytes, with a header of ${length})`);
  }
  const arrays = new Map();
  const entries = Object.entries(record(parseJson(bytes.subarray(8, start), ARRAYS), ARRAYS, "header"))
    .filter(([name]) => name !== "__metadata__")
    .sort(([, a], [, b]) => a?.data_offsets?.[0] - b?.data_offsets?.[0]);
  let filled = 0;
  for (const [name, entry] of entries) {
    const { dtype, shape, data_offsets: offsets } = record(entry, ARRAYS, name);
    const sizes = Array.isArray(shape) && shape.every((side) => Number.isSafeInteger(side) && side >= 0);
    const size = sizes && shape.reduce((product, side) => product * side, ITEM_BYTES.get(dtype) ?? NaN);
    const [from, to] = Array.isArray(offsets) ? offsets : [];
    if (from !== filled || to - from !== size || start + to > bytes.length) {
      refuse(`${ARRAYS}: damaged (${name.slice(0, 40)}: ${shown(entry)})`);
    }
    arrays.set(name, { dtype, shape, data: bytes.subarray(start + from, start + to) });
    filled = to;
  }
  if (start + filled !== bytes.length) {
    refuse(`${ARRAYS}: damaged (arrays of ${filled} bytes, but ${bytes.length - start} are there)`);
  }
  return arrays;
}

function expected(arrays, name, dtype, shape) {
  const found = arrays.get(name);
  if (found?.dtype !== dtype || String(found.shape) !== String(shape)) {
    const what = found ? `${found.dtype}[${found.shape}]` : "nothing";
    refuse(`${ARRAYS}: ${name}: expected ${dtype}[${shape}], found ${what}`);
  }
  return found.data;
}

/** The numbers of an array of float32, or of bfloat16, which are its upper halves. */
function floats(arrays, name, dtype, shape) {
  const data = expected(arrays, name, dtype, shape).slice();
  if (dtype === "F32") return new Float32Array(data.buffer);
  return new Float32Array(Uint32Array.from(new Uint16Array(data.buffer), (half) => half << 16).buffer);
}

/**
 * Reads a set.
 *
 * @param {Uint8Array} manifestBytes of manifest.json
 * @param {Uint8Array} arrayBytes of synset.safetensors
 * @returns a set: what it says of itself; `image(i)`, the Gaussians of an image, NUMBERS each, the strongest first, or
 *   in a set of pixels `pixels(i)`, `[h * w * 3]`; `points`, Gaussians of each image, 0 in a set of pixels.
 */
async function readSet(manifestBytes, arrayBytes) {
  const manifest = record(parseJson(manifestBytes, MANIFEST), MANIFEST, "all of it");
  const format = String(manifest.format);
  if (format.startsWith("gsdd_jax merged/")) {
    refuse(`${MANIFEST}: a set that was merged from parts; open the folder of a part`);
  }
  if (!["gsdd_jax/1", "gsdd_jax/2"].includes(format)) {
    const why = /^gsdd_jax\/\d+$/.test(format) ? "it is newer than this page" : "it is no distilled set";
    refuse(`${MANIFEST}: format: expected "gsdd_jax/1" or "gsdd_jax/2", found ${shown(manifest.format)}; ${why}`);
  }
  const shape = Array.isArray(manifest.image_shape) ? manifest.image_shape : [];
  if (shape.length > 3) {
    refuse(`${MANIFEST}: image_shape: this page shows images, found videos ${shown(shape)}; see python -m train.export`);
  }
  const [height, width, channels] = [0, 1, 2].map((i) => integer(shape, i, 1, 1 << 13, `image_shape[${i}]`));
  if (channels !== 1 && channels !== 3) {
    refuse(`${MANIFEST}: image_shape: this page shows images of 1 or 3 channels, found ${channels}`);
  }
  if (height * width > VALUES / 3) refuse(`${MANIFEST}: image_shape: found ${height} × ${width}, which is too large`);
  const classes = integer(manifest, "num_classes", 1, 1 << 16);
  const perClass = integer(manifest, "images_per_class", 1, 1 << 20);
  const names = manifest.class_names;
  if (!Array.isArray(names) || names.length !== classes) {
    refuse(`${MANIFEST}: class_names: expected ${classes}, one per class, found ${shown(names)}`);
  }
  const codec = record(manifest.codec, MANIFEST, "codec");
  const read = new Map(Object.entries({ gaussian, packed_gaussian: packedGaussian, pixel })).get(codec.name);
  if (!read) {
    const known = "gaussian, packed_gaussian and pixel sets";
    refuse(`${MANIFEST}: codec.name: this page shows ${known}, found ${shown(codec.name)}; see python -m train.export`);
  }
  const arrays = readArrays(arrayBytes);
  const labels = (arrays.get("labels")?.data.length ?? 0) + (arrays.get("label_indices")?.data.length ?? 0);
  const set = {
    name: String(manifest.meta?.name ?? "distilled set"),
    codec: codec.name,
    classNames: names.map(String),
    count: classes * perClass,
    bytes: [...arrays.values()].reduce((sum, { data }) => sum + data.length, 0),
    classes, perClass, labels, height, width, channels,
  };
  Object.assign(set, read(codec, set, arrays));
  // Browsers have it on pages of files and of https.
  if (manifest.sha256 && globalThis.crypto?.subtle) {
    const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", arrayBytes));
    if ([...sum].map((byte) => byte.toString(16).padStart(2, "0")).join("") !== manifest.sha256) {
      refuse(`${ARRAYS}: its SHA-256 is not that of ${MANIFEST}: the file is damaged, or of another set`);
    }
  }
  return set;
}

function drawing(codec, most) {
  const { cutoff } = codec;
  if (typeof cutoff !== "number" || !(cutoff >= 0 && cutoff < 1)) {
    refuse(`${MANIFEST}: codec.cutoff: expected a number >= 0 and < 1, found ${shown(cutoff)}`);
  }
  const points = integer(codec, "num_points", 1, most, "codec.num_points");
  return { points, supersample: integer(codec, "supersample", 1, 64, "codec.supersample"), cutoff };
}

function floatType(codec) {
  const dtype = new Map(Object.entries({ float32: "F32", bfloat16: "BF16" })).get(codec.dtype);
  return dtype ?? refuse(`${MANIFEST}: codec.dtype: expected float32 or bfloat16, found ${shown(codec.dtype)}`);
}

function gaussian(codec, { count, channels }, arrays) {
  const settings = drawing(codec, 1 << 16), dtype = floatType(codec), m = settings.points;
  const [mean, cholesky, color, opacity] = Object.entries({ mean: 2, cholesky: 3, color: channels, opacity: 0 }).map(
    ([name, last]) => floats(arrays, name, dtype, last ? [count, m, last] : [count, m]),
  );
  const image = (i) => gaussians(m, channels, (j, put) => {
    const at = i * m + j, last = at * channels;
    put(mean[2 * at], mean[2 * at + 1], cholesky[3 * at], cholesky[3 * at + 1], cholesky[3 * at + 2],
      color[last] * opacity[at], color[last + 1] * opacity[at], color[last + 2] * opacity[at]);
  });
  return { ...settings, image: remembered(image) };
}

/** An image of m Gaussians, the strongest first, for the slider: by the energy of what each adds. */
function gaussians(m, channels, of) {
  const raw = new Float64Array(NUMBERS * m), energy = new Float64Array(m);
  for (let j = 0; j < m; j++) {
    of(j, (x, y, l11, l21, l22, red, green, blue) => {
      if (channels === 1) green = blue = red;
      // Raw zeros are half-pixel Gaussians.
      raw.set([x, y, l11 + 0.5, l21, l22 + 0.5, red, green, blue], NUMBERS * j);
      const area = Math.sqrt((raw[NUMBERS * j + 2] ** 2 + PREFILTER) * (raw[NUMBERS * j + 4] ** 2 + PREFILTER));
      energy[j] = area * (red ** 2 + green ** 2 + blue ** 2);
    });
  }
  const order = [...energy.keys()].sort((a, b) => energy[b] - energy[a] || 0);
  const image = new Float64Array(raw.length);
  order.forEach((from, to) => image.set(raw.subarray(NUMBERS * from, NUMBERS * (from + 1)), NUMBERS * to));
  return image;
}

/** Decodes an image when it is first looked at. */
function remembered(decode) {
  const known = new Map();
  return (i) => known.get(i) ?? known.set(i, decode(i)).get(i);
}

// Packed Gaussians: codes of a few bits, see gsdd_jax/packing.py and docs/packed.md.

function packedGaussian(codec, { count, channels }, arrays) {
  const width = (key, least = 1) => integer(codec, key, least, 16, `codec.${key}`);
  const [bitsMean, bitsCholesky, bitsColor] = ["bits_mean", "bits_cholesky", "bits_color"].map((key) => width(key));
  const bitsChroma = "bits_chroma" in codec ? width("bits_chroma", 0) : 0;
  if (bitsChroma && channels !== 3) refuse(`${MANIFEST}: codec.bits_chroma: expected 0, found ${bitsChroma}`);
  if (!["sorted", "kept"].includes(codec.order)) {
    refuse(`${MANIFEST}: codec.order: expected sorted or kept, found ${shown(codec.order)}`);
  }
  const sorted = codec.order === "sorted", settings = drawing(codec, sorted ? SORTED_POINTS : 1 << 16);
  const m = settings.points, symbols = 4 ** bitsMean;
  const most = sorted ? binomial(symbols + m - 1, m) : 0n;
  const positionBits = sorted ? (most - 1n).toString(2).length : 2 * m * bitsMean;
  const luma = bitsChroma ? 1 : channels, bitsGaussian = codec.bits_gaussian ?? 0;
  if (typeof bitsGaussian !== "number" || !(bitsGaussian >= 0)) {
    refuse(`${MANIFEST}: codec.bits_gaussian: expected a number >= 0, found ${shown(bitsGaussian)}`);
  }
  const parts = [];
  let end = count * positionBits;
  const positions = Math.ceil(end / 8);
  for (const [numbers, bits] of [[3, bitsCholesky], [luma, bitsColor], [channels - luma, bitsChroma]]) {
    for (let i = 0; i < numbers; i++) parts.push({ at: end + i * bits, stride: numbers * bits, bits });
    end += count * m * numbers * bits;
  }
  if (bitsGaussian) end = count * (m * bitsGaussian);
  const codes = expected(arrays, "codes", "U8", [Math.ceil(end / 8)]);
  const coded = bitsGaussian && entropyCoded(codes.subarray(positions), parts.length, count * m);
  if (coded && !bitsChroma) {
    for (let k = 4; k < coded.length; k++) coded[k].forEach((more, at) => (coded[k][at] = coded[k - 1][at] + more));
  }
  if (coded && coded.some((kind) => kind.some((code) => code < 0 || code > LARGEST))) {
    refuse(`${ARRAYS}: codes: entropy-coded numbers must lie in 0 to ${LARGEST}`);
  }
  if (!coded && readBits(codes, end, 8 * codes.length - end)) {
    refuse(`${ARRAYS}: codes: bits after the last code must be 0`);
  }
  const [low, step] = ["low", "step"].map((name) => floats(arrays, name, "BF16", [3 + channels]));
  // None is finer than codes come back from; rounded to bfloat16, ties to even.
  const steps = step.map((value, i) => {
    const number = new Float32Array([Math.max(value, FINEST_STEP * Math.max(1, Math.abs(low[i])))]);
    const bits = new Uint32Array(number.buffer);
    bits[0] = ((bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) >>> 16) << 16;
    return number[0];
  });
  const ranks = sorted ? Array.from({ length: count }, (_, i) => readBig(codes, i * positionBits, positionBits)) : [];
  const wrong = ranks.findIndex((rank) => rank >= most);
  if (wrong >= 0) refuse(`${ARRAYS}: codes: no ${m} positions have the number that image ${wrong} has`);
  const side = 2 ** bitsMean, cell = 2 / side;
  const image = (i) => {
    const keys = sorted && unrank(ranks[i], m);
    return gaussians(m, channels, (j, put) => {
      const at = i * m + j;
      const [x, y] = sorted ? [keys[j] % side, Math.floor(keys[j] / side)] : [0, 1].map(
        (axis) => readBits(codes, (2 * at + axis) * bitsMean, bitsMean),
      );
      const [l11, l21, l22, ...color] = parts.map((part, k) => {
        const code = coded ? coded[k][at] : readBits(codes, part.at + at * part.stride, part.bits);
        return Math.fround(low[k] + Math.fround(code * steps[k]));
      });
      put(cell / 2 - 1 + x * cell, cell / 2 - 1 + y * cell, l11, l21, l22, ...(bitsChroma ? rgb(...color) : color));
    });
  };
  return { ...settings, image: remembered(image) };
}

// The entropy coder, see gsdd_jax/rans.py.

const LARGEST = 1023, PRECISION = 14, LEVEL_BITS = 5, SPAN_BITS = 11;

/** Reads numbers of so many kinds, `each` of every kind: an Int16Array for each kind. */
function entropyCoded(bytes, kinds, each) {
  const total = kinds * each, lanes = Math.min(Math.max(total >> 11, 1), 64);
  let at = 0;
  const digits = (width) => {
    if (at + width > 8 * bytes.length) refuse(`${ARRAYS}: codes: they end too early`);
    at += width;
    return readBits(bytes, at - width, width);
  };
  const tables = Array.from({ length: kinds }, () => entropyTable(digits));
  const states = Array.from({ length: lanes }, () => {
    at = 8 * Math.ceil(at / 8);
    return digits(16) * 65536 + digits(16);
  });
  const found = Array.from({ length: kinds }, () => new Int16Array(each));
  for (let i = 0; i < total; i++) {
    const { numbers, frequency, below } = tables[Math.floor(i / each)], x = states[i % lanes];
    const slot = x % (1 << PRECISION), number = numbers[slot];
    const next = frequency[number] * Math.floor(x / (1 << PRECISION)) + slot - below[number];
    states[i % lanes] = next < 65536 ? next * 65536 + digits(16) : next;
    found[Math.floor(i / each)][i % each] = number - LARGEST;
  }
  if (states.some((x) => x !== 65536) || bytes.subarray(at / 8).some(Boolean)) {
    refuse(`${ARRAYS}: codes: the entropy coder did not write them`);
  }
  return found;
}

/** Reads half octaves; frequencies add up to 2^PRECISION, of which slot k is that of the number `numbers[k]`. */
function entropyTable(digits) {
  const size = 2 * LARGEST + 1, weights = new Float64Array(size);
  let i = digits(SPAN_BITS);
  const last = i + digits(SPAN_BITS);
  while (i <= last && last < size) {
    const level = digits(LEVEL_BITS);
    if (level) weights[i++] = Math.round(2 ** (level / 2));
    else i += 1 + digits(LEVEL_BITS);
  }
  if (i !== last + 1 || !weights[last]) refuse(`${ARRAYS}: codes: no table of frequencies`);
  const sum = weights.reduce((a, b) => a + b), shared = (1 << PRECISION) - weights.filter(Boolean).length;
  const frequency = weights.map((weight) => weight && 1 + Math.floor((weight * shared) / sum));
  frequency[weights.indexOf(Math.max(...weights))] += (1 << PRECISION) - frequency.reduce((a, b) => a + b);
  const below = new Float64Array(size), numbers = new Uint16Array(1 << PRECISION);
  for (let number = 0, sum = 0; number < size; sum += frequency[number++]) {
    below[number] = sum;
    numbers.fill(number, sum, sum + frequency[number]);
  }
  return { numbers, frequency, below };
}

function rgb(y, co, cg) {
  const rest = y - cg / 2;
  return [rest + co / 2, rest + cg, rest - co / 2];
}

/** Reads a code of at most 16 bits, the most significant first, at a bit of the bytes. */
function readBits(bytes, at, width) {
  const byte = Math.floor(at / 8);
  const three = (bytes[byte] << 16) | (bytes[byte + 1] << 8) | bytes[byte + 2];
  return (three >> (24 - (at % 8) - width)) & ((1 << width) - 1);
}

function readBig(bytes, at, width) {
  let digits = "0x";
  for (let read = 0, size = width % 4 || 4; read < width; read += size, size = 4) {
    digits += readBits(bytes, at + read, size).toString(16);
  }
  return BigInt(digits);
}

const factorials = [1n];

function factorial(k) {
  while (factorials.length <= k) factorials.push(factorials.at(-1) * BigInt(factorials.length));
  return factorials[k];
}

/** C(n, k), with as many factors at once as a Number holds. */
function binomial(n, k) {
  let product = 1n, factors = 1;
  for (let j = 0; j < k; j++) {
    if (factors * (n - j) > Number.MAX_SAFE_INTEGER) {
      product *= BigInt(factors);
      factors = 1;
    }
    factors *= n - j;
  }
  return (product * BigInt(factors)) / factorial(k);
}

function logarithm(big) {
  const digits = big.toString(16), head = digits.slice(0, 12);
  return Math.log(parseInt(head, 16)) + (digits.length - head.length) * Math.log(16);
}

/** The sorted codes of a multiset, from its number among all of its size (combinatorial number system). */
function unrank(number, count) {
  const codes = new Float64Array(count);
  for (let i = count; i > 0; i--) {
    // The largest d with C(d, i) <= number. C(d, i) i! is about (d - (i - 1) / 2)^i; what this misses is walked.
    const root = number ? Math.exp((logarithm(number) + logarithm(factorial(i))) / i) : 0;
    let top = Math.max(Math.round(root + (i - 1) / 2), i);
    let ways = binomial(top, i);
    for (; ways > number; top--) ways = (ways * BigInt(top - i)) / BigInt(top);
    for (;;) {
      const more = top >= i ? (ways * BigInt(top + 1)) / BigInt(top + 1 - i) : 1n;
      if (more > number) break;
      ways = more;
      top++;
    }
    number -= ways;
    codes[i - 1] = top - (i - 1);
  }
  return codes;
}

// Pixels.

function pixel(codec, { count, height, width, channels }, arrays) {
  const size = height * width * channels, shape = [count, height, width, channels];
  // A byte b is b / 85 - 1.
  const values = codec.dtype === "uint8"
    ? Float32Array.from(expected(arrays, "images", "U8", shape), (byte) => Math.fround(byte - 85) * Math.fround(1 / 85))
    : floats(arrays, "images", floatType(codec), shape);
  const pixels = (i) => {
    const own = values.subarray(i * size, (i + 1) * size);
    return channels === 3 ? own : Float32Array.from({ length: 3 * size }, (_, at) => own[Math.floor(at / 3)]);
  };
  return { points: 0, pixels };
}

// Drawing: gsdd_jax.gaussians.to_pixels and kernels.splat.

/**
 * Maps an image of Gaussians to a grid of pixels: center x and y, half of the box in which it is not zero, and p, r, s,
 * with which its weight at (dx, dy) from the center is exp(-((p dx + r dy)^2 + (s dy)^2) / 2).
 *
 * @returns {?Float64Array} 7 numbers for each; null where one is not finite.
 */
function toPixels(set, image, width, height) {
  const clip = (x) => Math.min(Math.max(x, -MAX_PIXELS), MAX_PIXELS);
  const growX = width / set.width, growY = height / set.height;
  const reach = set.cutoff ? Math.sqrt(-2 * Math.log(set.cutoff)) : Infinity;
  const splats = new Float64Array((7 * image.length) / NUMBERS);
  for (let i = 0, at = 0; i < image.length; i += NUMBERS, at += 7) {
    const l11 = clip(image[i + 2] * growX), l21 = clip(image[i + 3] * growY), l22 = clip(image[i + 4] * growY);
    const varianceY = l21 ** 2 + l22 ** 2 + PREFILTER;
    const p = 1 / Math.sqrt(PREFILTER + l11 ** 2 * ((l22 ** 2 + PREFILTER) / varianceY));
    const r = -((l11 * l21) / varianceY) * p, s = 1 / Math.sqrt(varianceY);
    splats[at] = clip((width / 2) * (image[i] + 1));
    splats[at + 1] = clip((height / 2) * (image[i + 1] + 1));
    splats[at + 2] = (reach * Math.sqrt(1 + (r / s) ** 2)) / p;
    splats[at + 3] = reach / s;
    [splats[at + 4], splats[at + 5], splats[at + 6]] = [p, r, s];
    const sum = splats[at] + splats[at + 1] + p + r + s + image[i + 5] + image[i + 6] + image[i + 7];
    if (!Number.isFinite(sum)) return null;
  }
  return splats;
}

/** Draws image i at its native size: RGBA bytes, magenta where a number is not finite. */
function rasterize(set, i) {
  const { width, height } = set, size = width * height;
  const sum = set.points ? drawGaussians(set, set.image(i)) : set.pixels(i);
  const bytes = new Uint8ClampedArray(4 * size);
  for (let pixel = 0; pixel < size; pixel++) {
    const [red, green, blue] = sum ? [sum[3 * pixel], sum[3 * pixel + 1], sum[3 * pixel + 2]] : [NaN, NaN, NaN];
    const broken = Number.isNaN(red + green + blue);
    bytes[4 * pixel] = broken ? 255 : 255 * red;
    bytes[4 * pixel + 1] = broken ? 0 : 255 * green;
    bytes[4 * pixel + 2] = broken ? 255 : 255 * blue;
    bytes[4 * pixel + 3] = 255;
  }
  return bytes;
}

function drawGaussians(set, image) {
  const { width, height, supersample, cutoff } = set, splats = toPixels(set, image, width, height);
  if (!splats) return null;
  const sum = new Float64Array(3 * width * height), samples = supersample * supersample;
  for (let i = 0, at = 0; i < image.length; i += NUMBERS, at += 7) {
    const [cx, cy, halfX, halfY, p, r, s, red, green, blue] = [...splats.subarray(at, at + 7), ...image.subarray(i + 5, i + 8)];
    const left = Math.max(0, Math.floor(cx - halfX)), right = Math.min(width, Math.ceil(cx + halfX));
    const top = Math.max(0, Math.floor(cy - halfY)), bottom = Math.min(height, Math.ceil(cy + halfY));
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        let weight = 0;
        for (let sample = 0; sample < samples; sample++) {
          const row = Math.floor(sample / supersample), column = sample - row * supersample;
          const dy = y + (row + 0.5) / supersample - cy, dx = x + (column + 0.5) / supersample - cx;
          const u = p * dx + r * dy, v = s * dy;
          const one = Math.exp(-0.5 * (u * u + v * v));
          if (one >= cutoff) weight += one;
        }
        weight /= samples;
        const to = 3 * (y * width + x);
        sum[to] += weight * red;
        sum[to + 1] += weight * green;
        sum[to + 2] += weight * blue;
      }
    }
  }
  return sum;
}
