// A safetensors file → { name: { shape, data } } in float32; an adapter's codes are decoded
// (docs/reference/small-adapters.md has their layout).

const CODED = /^(.+?)(\.lora)?\.([2348])bit\.(\d{1,7})(?:x(\d{1,7}))?$/;
const NUMBERS = { F32: 4, F16: 2, BF16: 2, F64: 8 }; // bytes of one
export const PEFT = "base_model.model.";

// Error where the bytes are no safetensors file of floating-point numbers and codes.
export function readTensors(bytes) {
  const { header, start } = readHeader(bytes);
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    const [begin, end] = offsets;
    const body = bytes.subarray(start + begin, start + end);
    if (dtype === "U8") Object.assign(tensors, decode(name, shape, body));
    else tensors[name] = { shape, data: numbers(name, dtype, shape, body) };
  }
  return tensors;
}

function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length < 8 ? 0 : Number(view.getBigUint64(0, true));
  if (length < 2 || length > bytes.length - 8) throw new Error("no safetensors file");
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  delete header.__metadata__;
  const end = Math.max(0, ...Object.values(header).map((entry) => entry.data_offsets[1]));
  if (8 + length + end !== bytes.length) throw new Error("a safetensors file that is not whole");
  return { header, start: 8 + length };
}

const count = (shape) => shape.reduce((product, size) => product * size, 1);

function numbers(name, dtype, shape, body) {
  const size = NUMBERS[dtype];
  if (!size) throw new Error(`${name}: expected floating-point numbers, got ${dtype}`);
  if (body.length !== size * count(shape)) throw new Error(`${name}: not of the shape ${shape}`);
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  const read = {
    F32: (at) => view.getFloat32(at, true),
    F64: (at) => view.getFloat64(at, true),
    F16: (at) => half(view.getUint16(at, true)),
    BF16: (at) => upperHalf(view.getUint16(at, true)),
  }[dtype];
  return Float32Array.from({ length: body.length / size }, (_, i) => read(i * size));
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const bits32 = new DataView(new ArrayBuffer(4));

function upperHalf(bits) {
  bits32.setUint32(0, bits << 16);
  return bits32.getFloat32(0);
}

// One tensor of codes: a matrix (rows, WIDTH), or the rows of A (rows, IN) and columns of B (OUT,
// rows).
function decode(name, [rows, rowBytes], body) {
  const match = CODED.exec(name);
  if (!match || Boolean(match[2]) !== Boolean(match[5])) {
    throw new Error(`${name}: bytes that are no codes`);
  }
  const bits = Number(match[3]);
  const widths = [match[4], match[5]].filter(Boolean).map(Number);
  const bytesOf = (width) => Math.ceil((width * bits) / 8);
  const expected = widths.reduce((sum, width) => sum + 4 + bytesOf(width), 0);
  if (rowBytes !== expected || body.length !== rows * rowBytes) {
    throw new Error(`${name}: expected ${expected} bytes a row, got ${rowBytes}`);
  }
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  const parts = widths.map((width) => new Float32Array(rows * width));
  const middle = (2 ** bits - 1) / 2;
  for (let row = 0; row < rows; row++) {
    let at = row * rowBytes + 4 * widths.length;
    widths.forEach((width, part) => {
      const scale = view.getFloat32(row * rowBytes + 4 * part, true);
      for (let i = 0; i < width; i++) {
        const bit = i * bits;
        const pair = body[at + (bit >> 3)] | ((body[at + (bit >> 3) + 1] ?? 0) << 8);
        const code = (pair >> (bit & 7)) & (2 ** bits - 1);
        parts[part][part === 0 ? row * width + i : i * rows + row] = scale * (code - middle);
      }
      at += bytesOf(width);
    });
  }
  const [first, second] = parts.map((data, part) => ({
    shape: part === 0 ? [rows, widths[0]] : [widths[1], rows],
    data,
  }));
  if (!match[2]) return { [match[1]]: first };
  const key = (side) => `${PEFT}${match[1]}.lora_${side}.weight`;
  return { [key("A")]: first, [key("B")]: second };
}
