//! What the tasks compute with.

use std::path::Path;

use v4_engine::model::Model;
use v4_kernels::{Cpu, Device, KvType, cpu::CpuOptions};
use v4_proto::ModelFiles;

/// What to compute with.
#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArgs {
    /// Threads; 0 is a thread a core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// An instruction set instead of the best one of this machine.
    #[arg(long)]
    isa: Option<String>,
    /// How keys and values are kept: `f16`, `bf16` or `q8_0`.
    #[arg(long, default_value = "f16", value_parser = kv_type)]
    kv_type: KvType,
    /// Products with quantised weights read floats, not eight bits.
    #[arg(long)]
    quality: bool,
}

fn kv_type(name: &str) -> Result<KvType, String> {
    KvType::named(name).ok_or_else(|| "f16, bf16 or q8_0".to_owned())
}

impl DeviceArgs {
    /// Threads, counted.
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads == 0 { cores() } else { self.threads }
    }

    /// The same with another number of threads.
    pub fn with_threads(&self, threads: usize) -> Self {
        Self { threads, ..self.clone() }
    }

    /// As arguments of this program.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--threads".to_owned(), self.threads().to_string()];
        arguments.extend(self.isa.iter().flat_map(|isa| ["--isa".to_owned(), isa.clone()]));
        arguments.extend(self.quality.then(|| "--quality".to_owned()));
        arguments
    }

    /// Starts the device.
    ///
    /// # Errors
    /// A sentence.
    pub fn start(&self) -> Result<Box<dyn Device>, String> {
        let Self { threads, isa, quality, .. } = self.clone();
        let options = CpuOptions { threads, isa, is_exact: quality };
        let cpu = Cpu::open(&options).map_err(|error| error.to_string())?;
        Ok(Box::new(cpu))
    }

    /// Opens a model on the device.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(&self, file: &Path) -> Result<Model, String> {
        Model::open(&files(file), self.start()?, &mut |_, _, _| {})
            .and_then(|model| model.with_kv_type(self.kv_type))
            .map_err(|error| error.to_string())
    }
}

/// A model of one file or folder.
pub fn files(file: &Path) -> ModelFiles {
    ModelFiles { weights: vec![file.to_owned()], ..ModelFiles::default() }
}
