// The WebAssembly file of ONNX Runtime. Packed, it is a quarter as large; size and digest are of
// the file inside, as some servers unpack it on the way.
export const RUNTIME = {
  packed: "ort-wasm-simd-threaded.wasm.gz",
  packedBytes: 3659927,
  file: "ort-wasm-simd-threaded.wasm",
  bytes: 14239897,
  sha256: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
};
