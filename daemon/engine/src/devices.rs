//! Which devices there are beside the host, and whether this build computes on them.

use std::ffi::OsStr;

use v4_kernels::nvml;
use v4_proto::{Gpu, Inventory};

/// Whether this build has an implementation of [`v4_kernels::Device`] for NVIDIA's GPUs. The CPU's
/// is the only one.
const COMPUTES_ON_CUDA: bool = false;

/// What the drivers of this machine say.
pub fn devices() -> Inventory {
    devices_of(OsStr::new(nvml::LIBRARY))
}

fn devices_of(library: &OsStr) -> Inventory {
    let found = match nvml::gpus(library) {
        Ok(found) => found,
        // Most machines: nothing to complain of.
        Err(nvml::NvmlError::NoDriver(_)) => return Inventory::default(),
        Err(error) => {
            let complaints = vec![error.to_string()];
            return Inventory { complaints, is_blind: true, ..Inventory::default() };
        }
    };
    let mut inventory = Inventory::default();
    for (index, gpu) in (0..).zip(found) {
        match gpu {
            Ok(gpu) => inventory.gpus.push(Gpu {
                index,
                name: gpu.name,
                uuid: gpu.uuid,
                total_bytes: gpu.total_bytes,
                used_bytes: gpu.used_bytes,
                capability: gpu.capability,
                can_compute: COMPUTES_ON_CUDA,
            }),
            Err(error) => inventory.complaints.push(format!("gpu{index}: {error}")),
        }
    }
    inventory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_driver_is_nothing_to_complain_of() {
        assert_eq!(devices_of(OsStr::new("/nowhere/libnvidia-ml.so.1")), Inventory::default());
    }

    #[test]
    fn a_gpu_of_this_machine_is_listed_and_not_computed_on() {
        let inventory = devices();
        if inventory == Inventory::default() {
            println!("skipped: a_gpu_of_this_machine_is_listed: no NVIDIA driver");
        }
        for gpu in &inventory.gpus {
            assert!(gpu.used_bytes <= gpu.total_bytes && !gpu.uuid.is_empty(), "{gpu:?}");
            assert!(!gpu.can_compute);
        }
    }
}
