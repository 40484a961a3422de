//! C and CUDA, and the only unsafe Rust of v4.
//!
//! **Owns** the quant formats, the arithmetic on them for each instruction set, the thread pool,
//! mapped files, the [`Device`] trait that the engine's layers are written in, and the questions to
//! a GPU's driver.
//!
//! **Never** knows a model, a file format, a socket or a policy. C allocates nothing, starts no
//! thread, does no input or output and keeps no state; Rust checks every length before C sees a
//! pointer.
//!
//! **Start reading at** [`Device`], then `cpu.rs`, then `include/v4.h`.

pub mod cpu;
mod device;
#[rustfmt::skip]
mod ffi;
pub mod map;
pub mod nvml;
pub mod pool;
pub mod probe;
pub mod quant;

pub use cpu::{Cpu, MAX_QUERY_GROUP};
pub use device::{
    Activation, Activations, Attention, Buffer, Device, DeviceError, ExpertWeights, Experts,
    GateUp, Input, KvCache, KvShape, KvType, Linear, Matrix, RmsNorm, Rope, RopeKind, Router,
    Routing, Span, Weight,
};
pub use map::{Bytes, Map};
pub use quant::Quant;
