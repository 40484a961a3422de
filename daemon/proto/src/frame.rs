//! The messages of the socket between daemon and runner, and their bytes.
//!
//! A frame is `u32` header length, `u32` body length (both little endian), a JSON header, raw body
//! bytes. JSON because a trace can be read, replayed and kept as a golden file. The codec does no
//! input or output: both ends read eight bytes, ask [`Lengths::parse`] how much follows, and hand
//! what they read to [`decode`].

use std::{path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Delta, Digest, Done, Fault, Generate, Inspection, Inventory, ModelFiles, ModelInfo, limits,
};

/// The number of this protocol. Another number at the other end is a fault, not a guess.
pub const PROTOCOL: u32 = 1;

/// The build that both ends must share beyond [`PROTOCOL`]: a runner is the daemon's own
/// executable.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Which request of a runner a frame belongs to. The daemon numbers them.
pub type RequestId = u64;

/// How a model's keys and values are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// Half precision.
    #[default]
    F16,
    /// The range of a float with 8 bits of precision, in as many bytes.
    Bf16,
    /// Bytes with a scale for each 32: about half of half precision.
    Q8_0,
}

impl KvType {
    /// All of them.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Bf16, KvType::Q8_0];

    /// The name that settings use.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// Bytes of what takes `half_bytes` in half precision.
    pub fn bytes(self, half_bytes: u64) -> u64 {
        match self {
            KvType::F16 | KvType::Bf16 => half_bytes,
            KvType::Q8_0 => half_bytes.div_ceil(64).saturating_mul(34),
        }
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| format!("{name:?} is not f16, bf16 or q8_0"))
    }
}

/// How exact the products of quantised weights are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Activations are rounded to eight bits, 32 of them sharing a scale.
    #[default]
    Fast,
    /// They stay floats: the weights are exact, and prompts are read several times slower.
    Quality,
}

impl Precision {
    /// The name that settings use.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Fast => "fast",
            Precision::Quality => "quality",
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Precision::Fast, Precision::Quality].into_iter().find(|it| it.name() == name);
        known.ok_or_else(|| format!("{name:?} is not fast or quality"))
    }
}

/// What a GPU has of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuShare {
    /// Which, as the inventory calls it.
    pub uuid: String,
    /// From this layer on, up to before that one.
    pub layers: [u32; 2],
}

/// Where a model lies that is not on the host alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnGpus {
    /// In the order of their layers. The embedding lies before the first layer, the output with the
    /// last one; layers before those of the first share are the host's.
    pub shares: Vec<GpuShare>,
    /// Experts of layers before this one lie in the host's memory.
    pub experts_from: u32,
}

/// How a model is put on its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadOptions {
    /// Where; `None` is on the host. Never a device that the inventory calls unable to compute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_gpus: Option<OnGpus>,
    /// Tokens of context for one sequence; cut to what the model was trained for.
    pub context: u32,
    /// Sequences that may run at a time.
    pub slots: u32,
    /// Threads for kernels; 0 is one a physical core this process may use.
    pub threads: u32,
    /// How keys and values are kept.
    #[serde(default)]
    pub kv_type: KvType,
    /// How exact products are.
    #[serde(default)]
    pub precision: Precision,
    /// Where keys and values outlive the process; `None` is nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_disk: Option<KvDisk>,
    /// An instruction set by name instead of the best one of this machine (tests, `--isa`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isa: Option<String>,
}

/// Where blocks of keys and values are kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvDisk {
    /// The folder of all models; each has one of its own in it. The quota counts both.
    pub root: PathBuf,
    /// The digests of the model's weights, in order; the first names its folder.
    pub models: Vec<Digest>,
    /// Bytes that the blocks of all models may take. Several runners that write at a time may pass
    /// it by a 32nd each until one of them counts again.
    pub quota_bytes: u64,
}

/// From the daemon to a runner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToRunner {
    /// Put this model on the device. Once a process.
    Load {
        /// The files.
        files: ModelFiles,
        /// How.
        options: LoadOptions,
    },
    /// Read the header of these files and answer `Info`.
    Inspect {
        /// The files.
        files: ModelFiles,
    },
    /// Say which devices there are and what is in use of them: answered by `Devices`, whatever
    /// else the runner is doing.
    Devices,
    /// Answer this request with `Delta`s and one `Done` or `Failed`.
    Generate {
        /// The daemon's number for it.
        id: RequestId,
        /// The request.
        request: Box<Generate>,
    },
    /// Stop work on a request; answered by `Done` with finish `cancelled` unless it has ended
    /// already.
    Cancel {
        /// Which.
        id: RequestId,
    },
    /// Compute with at most this many threads from the next step on: other runners work too.
    Cores {
        /// At least one.
        threads: u32,
    },
    /// Take nothing new, finish what runs until the deadline, answer `Drained`, exit 0.
    Drain {
        /// Milliseconds from now.
        deadline_ms: u64,
    },
}

/// What a load is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Reading the header and the tokenizer.
    Header,
    /// Bringing the weights into memory.
    Weights,
}

/// Figures of a running runner, every second. Also the heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that wait for a place.
    pub waiting: u32,
    /// KV blocks in use.
    pub blocks_used: u32,
    /// KV blocks there are.
    pub blocks_total: u32,
    /// Steps of the engine since the start. Work in flight and no change here is a hang.
    pub steps: u64,
    /// Blocks given to the disk since the start.
    #[serde(default)]
    pub blocks_saved: u64,
    /// Blocks that came back from there.
    #[serde(default)]
    pub blocks_restored: u64,
    /// Tokens that were guessed since the start.
    #[serde(default)]
    pub drafted: u64,
    /// Of these, those that the model chose too: each one saved a step.
    #[serde(default)]
    pub accepted: u64,
}

/// From a runner to the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromRunner {
    /// The first frame of a runner.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// [`BUILD`].
        build: String,
    },
    /// A load goes on.
    Progress {
        /// What it is doing.
        stage: Stage,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The model answers requests from now on.
    Ready {
        /// Its figures.
        info: ModelInfo,
        /// Tokens of context a sequence gets.
        context: u32,
        /// Bytes this process needs for weights, KV and scratch.
        memory_bytes: u64,
    },
    /// The answer to `Inspect`.
    Info {
        /// What the header says.
        inspection: Box<Inspection>,
    },
    /// The answer to `Devices`.
    Devices {
        /// What there is at this moment.
        inventory: Inventory,
    },
    /// More of an answer.
    Delta {
        /// Of which request.
        id: RequestId,
        /// What.
        delta: Delta,
    },
    /// The end of an answer.
    Done {
        /// Of which request.
        id: RequestId,
        /// How.
        done: Done,
    },
    /// The end of an answer for a reason that is not the model's.
    Failed {
        /// Of which request.
        id: RequestId,
        /// Why.
        fault: Fault,
    },
    /// All work ended after `Drain`; the process exits.
    Drained,
    /// The heartbeat.
    Stats(Stats),
    /// `Load` or `Inspect` failed, or the engine broke; the process exits.
    Fatal {
        /// Why.
        fault: Fault,
    },
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A length beyond [`limits`].
    #[error("a frame claims a header of {header} and a body of {body} bytes, beyond the limits")]
    TooLong {
        /// Bytes the header claims.
        header: usize,
        /// Bytes the body claims.
        body: usize,
    },
    /// The header is not the JSON of a message.
    #[error("a frame's header is not a message: {0}")]
    Header(#[from] serde_json::Error),
}

/// Bytes of the fixed start of a frame.
pub const LENGTHS_BYTES: usize = 8;

/// How many bytes follow the fixed start of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes of JSON.
    pub header: usize,
    /// Raw bytes after it.
    pub body: usize,
}

impl Lengths {
    /// Reads the fixed start.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] beyond [`limits::FRAME_HEADER_BYTES`] or
    /// [`limits::FRAME_BODY_BYTES`].
    pub fn parse(start: [u8; LENGTHS_BYTES]) -> Result<Self, FrameError> {
        let [a, b, c, d, e, f, g, h] = start;
        let header = u32::from_le_bytes([a, b, c, d]) as usize;
        let body = u32::from_le_bytes([e, f, g, h]) as usize;
        if header > limits::FRAME_HEADER_BYTES || body > limits::FRAME_BODY_BYTES {
            return Err(FrameError::TooLong { header, body });
        }
        Ok(Self { header, body })
    }
}

/// The bytes of a message and its body.
///
/// # Errors
/// [`FrameError::TooLong`] when either is beyond its limit.
///
/// # Panics
/// Never: the limits are below 4 GiB.
pub fn encode<T: Serialize>(message: &T, body: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; LENGTHS_BYTES];
    serde_json::to_writer(&mut bytes, message)?;
    let header = bytes.len() - LENGTHS_BYTES;
    if header > limits::FRAME_HEADER_BYTES || body.len() > limits::FRAME_BODY_BYTES {
        return Err(FrameError::TooLong { header, body: body.len() });
    }
    let as_u32 = |n: usize| u32::try_from(n).expect("the limits are below 4 GiB").to_le_bytes();
    bytes[..4].copy_from_slice(&as_u32(header));
    bytes[4..LENGTHS_BYTES].copy_from_slice(&as_u32(body.len()));
    bytes.extend_from_slice(body);
    Ok(bytes)
}

/// The message of a header's bytes.
///
/// # Errors
/// [`FrameError::Header`] when they are not JSON of that message.
pub fn decode<T: DeserializeOwned>(header: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(header)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Code, Finish, Gpu, Input, SamplingParams, Usage};

    fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T) {
        let bytes = encode(message, b"body").expect("encodes");
        let start = bytes[..LENGTHS_BYTES].try_into().expect("eight bytes");
        let lengths = Lengths::parse(start).expect("within the limits");
        let (header, body) = bytes[LENGTHS_BYTES..].split_at(lengths.header);
        assert_eq!((body, body.len()), (&b"body"[..], lengths.body));
        assert_eq!(&decode::<T>(header).expect("decodes"), message);
    }

    #[test]
    fn messages_survive_the_wire() {
        round_trip(&ToRunner::Generate {
            id: 7,
            request: Box::new(Generate {
                input: Input::Raw { text: "a\u{0}\"ß\n".into() },
                sampling: SamplingParams { seed: Some(u64::MAX), ..SamplingParams::greedy() },
                max_tokens: Some(3),
                stop: vec!["x".into()],
                context: None,
                truncate: true,
                lane: crate::Lane::Background,
            }),
        });
        round_trip(&ToRunner::Drain { deadline_ms: 5 });
        round_trip(&FromRunner::Hello { protocol: PROTOCOL, build: BUILD.into() });
        round_trip(&FromRunner::Done {
            id: 1,
            done: Done {
                finish: Finish::Length,
                usage: Usage { prompt_tokens: 9, ..Usage::default() },
            },
        });
        round_trip(&FromRunner::Failed {
            id: 1,
            fault: Fault::new(Code::ContextOverflow, "too long"),
        });
        round_trip(&FromRunner::Stats(Stats { steps: 4, ..Stats::default() }));
        let gpu = Gpu {
            index: 1,
            name: "x".into(),
            uuid: "GPU-1".into(),
            total_bytes: u64::MAX,
            used_bytes: 1,
            capability: [9, 0],
            can_compute: false,
        };
        let inventory =
            Inventory { gpus: vec![gpu], complaints: vec!["it is lost".into()], is_blind: true };
        round_trip(&ToRunner::Devices);
        round_trip(&FromRunner::Devices { inventory });
    }

    #[test]
    fn a_kv_type_has_one_name_and_costs_what_its_blocks_do() {
        for kind in KvType::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).expect("encodes"), kind.name());
        }
        assert!("f32".parse::<KvType>().is_err());
        // 16 layers of 8 heads of 64, keys and values.
        let half = 2 * 2 * 16 * 8 * 64;
        assert_eq!(KvType::ALL.map(|kind| kind.bytes(half)), [half, half, half / 64 * 34]);
        assert_eq!(KvType::Q8_0.bytes(u64::MAX), u64::MAX / 64 * 34 + 34);
        let old = r#"{"context":1,"slots":1,"threads":1}"#;
        let options: LoadOptions = serde_json::from_str(old).expect("decodes");
        assert_eq!((options.kv_type, options.precision), (KvType::F16, Precision::Fast));
        let shares = vec![GpuShare { uuid: "GPU-1".into(), layers: [2, 9] }];
        let on_gpus = Some(OnGpus { shares, experts_from: 4 });
        let options = Box::new(LoadOptions { on_gpus, ..options });
        round_trip(&ToRunner::Load { files: ModelFiles::default(), options: *options });
    }

    #[test]
    fn hostile_lengths_are_refused_before_memory_is_taken() {
        let huge = [0xff; LENGTHS_BYTES];
        assert!(matches!(Lengths::parse(huge), Err(FrameError::TooLong { .. })));
        let edge = u32::try_from(limits::FRAME_HEADER_BYTES).expect("fits");
        let mut start = [0; LENGTHS_BYTES];
        start[..4].copy_from_slice(&edge.to_le_bytes());
        assert!(Lengths::parse(start).is_ok());
        start[..4].copy_from_slice(&(edge + 1).to_le_bytes());
        assert!(Lengths::parse(start).is_err());
    }

    #[test]
    fn any_bytes_decode_or_fail_cleanly() {
        for bytes in [
            &b""[..],
            b"{",
            b"null",
            b"[1]",
            b"{\"type\":\"nope\"}",
            b"{\"type\":\"cancel\"}",
            &[0xff, 0xfe],
        ] {
            assert!(decode::<ToRunner>(bytes).is_err());
        }
    }
}
