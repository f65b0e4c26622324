// What is sent, unpacked: a JSON head and one block of bytes.
const VERSION = 1;
const FIRST_CODE = -32641; // before the first bucket that there can be

export async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// A reader of whole numbers from 0 on, seven bits a byte, from `at` on.
function varints(bytes, at) {
  return () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
}

function signed(value) { return value % 2 ? -(value + 1) / 2 : value / 2; }

// The buckets of one tensor: the gaps between their codes, then the steps between their counts.
export function bucketsAt(bytes, at, n) {
  const next = varints(bytes, at);
  const codes = new Int16Array(n);
  const counts = new Float64Array(n);
  for (let i = 0, code = FIRST_CODE; i < n; i++) codes[i] = code += next() + 1;
  for (let i = 0, count = 0; i < n; i++) counts[i] = count += signed(next());
  return { codes, counts };
}

// What a tensor is called: by its module; of several readers by what they share, such as q/k/v_proj.
function nameOf(paths, { kind, expert }) {
  if (paths.length === 1) return paths[0];
  const last = kind.slice(kind.lastIndexOf(".") + 1);
  const parent = paths[0].slice(0, paths[0].lastIndexOf("."));
  return `${expert === null ? parent.replace(/(\.experts)\.\d+$/, "$1.*") : parent}.${last}`;
}

// A record: its head, with tensors that load their buckets when these are first looked at. Tensors that share
// values share them.
export function recordOf(head, bytes) {
  if (head.v !== VERSION) {
    throw new Error(`this data has version ${head.v}, and this page reads version ${VERSION}: write it again`);
  }
  const loaded = new Map();
  const load = (number) => {
    const stats = head.stats[number];
    if (!loaded.has(number)) loaded.set(number, { ...stats, ...bucketsAt(bytes, stats.at, stats.buckets) });
    return loaded.get(number);
  };
  const tensors = head.tensors.map((tensor, index) => {
    const paths = tensor.modules.map((number) => head.modules[number]);
    const named = { paths, path: paths[0], name: nameOf(paths, tensor) };
    return { ...head.stats[tensor.stats], ...tensor, ...named, index, load: () => load(tensor.stats) };
  });
  return { ...head, tensors };
}

// From the compressed string to the record.
export async function unpacked(bytes) {
  const raw = await inflated(bytes);
  const length = new DataView(raw.buffer, raw.byteOffset).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + length)));
  return recordOf(head, raw.subarray(4 + length));
}
