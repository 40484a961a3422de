//! What both columns of v4 say to each other: the control plane (`v4 serve`) and a model's process
//! (`v4 runner`).
//!
//! **Owns** names and digests, the domain request and answer, faults, and the frames of the socket
//! with their codec.
//!
//! **Never** does input or output, knows a dialect (Ollama, OpenAI), an HTTP status, or a file
//! format.
//!
//! **Start reading at** [`request::Generate`], then [`frame`].

#![forbid(unsafe_code)]

pub mod device;
pub mod event;
pub mod fault;
pub mod frame;
pub mod info;
pub mod limits;
pub mod name;
pub mod paths;
pub mod request;

pub use device::{Gpu, Inventory};
pub use event::{Delta, Done, Event, Finish, ToolCall, Usage};
pub use fault::{Code, Fault};
pub use info::{Ability, Inspection, LayerRun, Layout, ModelInfo, TensorInfo};
pub use name::{Digest, ModelName};
pub use request::{Generate, Input, Lane, Message, ModelFiles, Role, SamplingParams, Think};
