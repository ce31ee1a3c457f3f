// Files of a bundle: fetched once, checked against the manifest's sha256, kept by that digest. So
// a base that two bundles share is fetched once, and what was changed on the way is never used.

export const CACHE = "edgetune";
const PIECE = 32 << 20; // bytes of a cached response: browsers refuse very large ones

// The file as { bytes, from, kept }: from "cache" or "network". `info` is its { sha256, bytes } in
// the manifest; null: no digest is known, so it is fetched every time. `progress(bytes)` hears of
// the parts that come.
export async function fetchFile(url, info = null, progress = () => {}) {
  if (!globalThis.caches || !crypto.subtle) {
    throw new Error(
      "open this page over https or from localhost: elsewhere browsers have no hashes",
    );
  }
  if (!info) return { bytes: await download(url, null, progress), from: "network" };
  const cache = await caches.open(CACHE);
  const key = new URL(`/sha256/${info.sha256}`, location.origin).href;
  const known = await recall(cache, key);
  if (known && (await sha256(known)) === info.sha256) return { bytes: known, from: "cache" };
  const bytes = await download(url, info.bytes, progress);
  const got = await sha256(bytes);
  if (got !== info.sha256) {
    const short = (digest) => `${digest.slice(0, 12)}…`;
    throw new Error(`${nameOf(url)}: expected sha256 ${short(info.sha256)}, got ${short(got)}`);
  }
  return { bytes, from: "network", kept: await keep(cache, key, bytes) };
}

// The file in pieces, the first one last, so that a file that has one is whole. False: no room.
async function keep(cache, key, bytes) {
  const pieces = Math.max(1, Math.ceil(bytes.length / PIECE));
  const headers = { pieces: String(pieces) };
  try {
    for (let i = pieces - 1; i >= 0; i--) {
      const piece = bytes.subarray(i * PIECE, (i + 1) * PIECE);
      await cache.put(`${key}/${i}`, new Response(piece, { headers }));
    }
    return true;
  } catch {
    for (let i = 0; i < pieces; i++) await cache.delete(`${key}/${i}`);
    return false;
  }
}

async function recall(cache, key) {
  const first = await cache.match(`${key}/0`);
  const count = Number(first?.headers.get("pieces") ?? 0);
  const parts = [];
  for (let i = 0; i < count; i++) {
    const part = i === 0 ? first : await cache.match(`${key}/${i}`);
    if (!part) return null;
    parts.push(new Uint8Array(await part.arrayBuffer()));
  }
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (bytes.set(part, at), at + part.length), 0);
  return count ? bytes : null;
}

// A JSON file; `otherwise` (where given) for one that is not there.
export async function fetchJson(url, info = null, otherwise = undefined) {
  try {
    return JSON.parse(new TextDecoder().decode((await fetchFile(url, info)).bytes));
  } catch (error) {
    if (error.status === 404 && otherwise !== undefined) return otherwise;
    throw error instanceof SyntaxError ? new Error(`${nameOf(url)} is no JSON`) : error;
  }
}

const nameOf = (url) => decodeURIComponent(new URL(url).pathname.split("/").pop());

async function download(url, expected, progress) {
  const response = await fetch(url, { cache: "no-cache" }).catch(() => {
    throw new Error(
      `${url} cannot be reached: is the address right, and does its server allow CORS?`,
    );
  });
  if (!response.ok) {
    const error = new Error(`${url}: the server says ${response.status}`);
    throw Object.assign(error, { status: response.status });
  }
  if (expected === null) return new Uint8Array(await response.arrayBuffer());
  const bytes = new Uint8Array(expected);
  let size = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (size + part.value.length <= expected) bytes.set(part.value, size);
    size += part.value.length;
    progress(part.value.length);
  }
  if (size !== expected) {
    throw new Error(`${nameOf(url)}: expected ${expected} bytes, got ${size}; copy it again`);
  }
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
