//! Which NVIDIA devices this machine has and how much of their memory is in use, as the driver's
//! own library (NVML) says. It is opened at run time: most machines have none.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};

use libloading::Library;

/// What the driver calls its library; the loader finds it.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// Devices that are listed at most: four times what one machine is sold with.
pub const MAX_GPUS: c_uint = 64;
/// Bytes that the driver's texts get, and more than NVML says it writes.
const TEXT_BYTES: c_uint = 96;

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// What it is sold as.
    pub name: String,
    /// What it is called wherever it is plugged in.
    pub uuid: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Of these, bytes that programs and the driver have, ours counted in.
    pub used_bytes: u64,
    /// Compute capability: major and minor.
    pub capability: [u32; 2],
}

/// Why the driver says nothing.
#[derive(Debug, thiserror::Error)]
pub enum NvmlError {
    /// Its library is not there, or cannot be loaded.
    #[error("no NVIDIA driver was found")]
    NoDriver(#[source] libloading::Error),
    /// It lacks a function.
    #[error("the NVIDIA driver's library has no {call}; update the driver")]
    NoCall {
        /// Which.
        call: &'static str,
        /// What the loader says.
        #[source]
        source: libloading::Error,
    },
    /// A call failed.
    #[error("the NVIDIA driver answers to {call}: {what} (error {code})")]
    Call {
        /// Which.
        call: &'static str,
        /// NVML's number.
        code: c_int,
        /// NVML's words.
        what: String,
    },
}

/// `nvmlDevice_t`.
type Handle = *mut c_void;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

// SAFETY: whoever calls it gives a handle of NVML's, and as much room as it says.
type Text = unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> c_int;

/// The calls that are used, of a library that stays loaded as long as they do.
struct Nvml {
    // SAFETY: the types are as NVML's header declares them, and pointers are to places of theirs.
    init: unsafe extern "C" fn() -> c_int,
    shutdown: unsafe extern "C" fn() -> c_int,
    count: unsafe extern "C" fn(*mut c_uint) -> c_int,
    by_index: unsafe extern "C" fn(c_uint, *mut Handle) -> c_int,
    name: Text,
    uuid: Text,
    memory: unsafe extern "C" fn(Handle, *mut Memory) -> c_int,
    capability: unsafe extern "C" fn(Handle, *mut c_int, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

/// The function of a name.
///
/// # Safety
/// `T` is what NVML's header declares for it.
unsafe fn call<T: Copy>(library: &Library, call: &'static str) -> Result<T, NvmlError> {
    // SAFETY: the caller says what the function is.
    let found = unsafe { library.get::<T>(call.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|source| NvmlError::NoCall { call, source })
}

impl Nvml {
    fn open(library: &OsStr) -> Result<Self, NvmlError> {
        // SAFETY: the driver's library does nothing when it is loaded but to set itself up.
        let library = unsafe { Library::new(library) }.map_err(NvmlError::NoDriver)?;
        // SAFETY: the fields have the types that NVML's header declares for these names.
        unsafe {
            Ok(Self {
                init: call(&library, "nvmlInit_v2")?,
                shutdown: call(&library, "nvmlShutdown")?,
                count: call(&library, "nvmlDeviceGetCount_v2")?,
                by_index: call(&library, "nvmlDeviceGetHandleByIndex_v2")?,
                name: call(&library, "nvmlDeviceGetName")?,
                uuid: call(&library, "nvmlDeviceGetUUID")?,
                memory: call(&library, "nvmlDeviceGetMemoryInfo")?,
                capability: call(&library, "nvmlDeviceGetCudaComputeCapability")?,
                error_string: call(&library, "nvmlErrorString")?,
                _library: library,
            })
        }
    }

    /// `code` of a call as a result.
    fn check(&self, call: &'static str, code: c_int) -> Result<(), NvmlError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NVML takes any number, and its answer is NULL or a text that is never freed.
        let what = unsafe {
            let text = (self.error_string)(code);
            if text.is_null() { c"no words for it" } else { CStr::from_ptr(text) }
        };
        Err(NvmlError::Call { call, code, what: what.to_string_lossy().into_owned() })
    }

    fn text(&self, name: &'static str, call: Text, gpu: Handle) -> Result<String, NvmlError> {
        let mut bytes = [0_u8; TEXT_BYTES as usize];
        let room = TEXT_BYTES - 1;
        // SAFETY: the bytes are as many as is said and one more, which stays zero.
        let code = unsafe { call(gpu, bytes.as_mut_ptr().cast(), room) };
        self.check(name, code)?;
        let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }

    fn gpu(&self, index: c_uint) -> Result<Gpu, NvmlError> {
        let mut gpu: Handle = std::ptr::null_mut();
        let mut memory = Memory::default();
        let (mut major, mut minor) = (0, 0);
        // SAFETY: each pointer is to a place of the type that NVML writes.
        let code = unsafe { (self.by_index)(index, &raw mut gpu) };
        self.check("nvmlDeviceGetHandleByIndex_v2", code)?;
        let name = self.text("nvmlDeviceGetName", self.name, gpu)?;
        let uuid = self.text("nvmlDeviceGetUUID", self.uuid, gpu)?;
        // SAFETY: as above; the handle is what NVML gave.
        let code = unsafe { (self.memory)(gpu, &raw mut memory) };
        self.check("nvmlDeviceGetMemoryInfo", code)?;
        // SAFETY: as above.
        let code = unsafe { (self.capability)(gpu, &raw mut major, &raw mut minor) };
        self.check("nvmlDeviceGetCudaComputeCapability", code)?;
        let capability = [major, minor].map(|n| u32::try_from(n).unwrap_or(0));
        let Memory { total, used, .. } = memory;
        Ok(Gpu { name, uuid, total_bytes: total, used_bytes: used.min(total), capability })
    }

    fn gpus(&self) -> Result<Vec<Result<Gpu, NvmlError>>, NvmlError> {
        let mut count = 0;
        // SAFETY: the pointer is to a place of the type that NVML writes.
        let code = unsafe { (self.count)(&raw mut count) };
        self.check("nvmlDeviceGetCount_v2", code)?;
        Ok((0..count.min(MAX_GPUS)).map(|index| self.gpu(index)).collect())
    }
}

/// The devices in the order of the driver, each with what it says or why it says nothing.
///
/// `library` is [`LIBRARY`], or the path of another one. Takes milliseconds, or a second where the
/// driver has to wake its devices.
///
/// # Errors
/// [`NvmlError`] where the driver as a whole says nothing.
pub fn gpus(library: &OsStr) -> Result<Vec<Result<Gpu, NvmlError>>, NvmlError> {
    let nvml = Nvml::open(library)?;
    // SAFETY: it takes nothing; the driver counts who has called it.
    let code = unsafe { (nvml.init)() };
    nvml.check("nvmlInit_v2", code)?;
    let gpus = nvml.gpus();
    // SAFETY: as above. What it answers changes nothing for us.
    let _ = unsafe { (nvml.shutdown)() };
    gpus
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "the compiler writes there for this test")]
    fn make(folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
    }

    #[expect(clippy::disallowed_methods, reason = "what the compiler wrote for this test")]
    fn remove(library: &Path) {
        std::fs::remove_dir_all(library.parent().unwrap()).unwrap();
    }

    /// A folder of this test's own, with the driver's double compiled with `flags` in it; `None`
    /// where the compiler makes no library that this test could load.
    fn double(name: &str, flags: &[&str]) -> Option<PathBuf> {
        let folder = std::env::temp_dir().join(format!("v4-nvml-{}-{name}", std::process::id()));
        make(&folder);
        let library = folder.join("libnvidia-ml.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvml_double.c");
        let machine = Command::new("cc").arg("-dumpmachine").output().unwrap();
        if !String::from_utf8_lossy(&machine.stdout).starts_with(std::env::consts::ARCH) {
            println!("skipped: {name}: cc makes libraries for another machine");
            return None;
        }
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(&library).args(flags).arg(source);
        assert!(cc.status().unwrap().success(), "{cc:?}");
        Some(library)
    }

    #[test]
    fn devices_are_listed_as_the_driver_says() {
        let Some(library) = double("two", &[]) else { return };
        for _ in 0..2 {
            let found = gpus(library.as_os_str()).unwrap();
            let found: Vec<Gpu> = found.into_iter().map(Result::unwrap).collect();
            let gpu = |name: &str, uuid: &str, total: u64, used: u64, capability| Gpu {
                name: name.into(),
                uuid: uuid.into(),
                total_bytes: total << 20,
                used_bytes: used << 20,
                capability,
            };
            let first = gpu("Double 24", "GPU-00000000-aaaa", 24_576, 1024, [8, 9]);
            let second = gpu("Double 80", "GPU-11111111-bbbb", 81_920, 512, [9, 0]);
            assert_eq!(found, [first, second]);
        }
        remove(&library);
    }

    #[test]
    fn without_a_driver_that_is_what_is_said() {
        let error = gpus(OsStr::new("/nowhere/libnvidia-ml.so.1")).unwrap_err();
        assert_eq!(error.to_string(), "no NVIDIA driver was found");
        let Some(library) = double("empty", &["-DNOTHING"]) else { return };
        let error = gpus(library.as_os_str()).unwrap_err();
        let words = "the NVIDIA driver's library has no nvmlInit_v2; update the driver";
        assert_eq!(error.to_string(), words);
        remove(&library);
    }

    #[test]
    fn a_driver_that_fails_at_any_call_is_quoted() {
        for (at, call) in ["nvmlInit_v2", "nvmlDeviceGetCount_v2"].iter().enumerate() {
            let flag = format!("-DFAIL_AT={}", at + 1);
            let Some(library) = double(call, &[&flag]) else { return };
            let error = gpus(library.as_os_str()).unwrap_err().to_string();
            let words = format!("the NVIDIA driver answers to {call}: Double trouble (error 18)");
            assert_eq!(error, words);
            remove(&library);
        }
        let calls = ["HandleByIndex_v2", "Name", "UUID", "MemoryInfo", "CudaComputeCapability"];
        for (at, call) in calls.iter().enumerate() {
            // The second device alone fails, as one does that has fallen off its bus.
            let flag = format!("-DFAIL_AT={}", at + 3);
            let Some(library) = double(call, &[&flag]) else { return };
            let found = gpus(library.as_os_str()).unwrap();
            assert_eq!(found[0].as_ref().unwrap().name, "Double 24");
            let error = found[1].as_ref().unwrap_err().to_string();
            assert!(error.contains(&format!("nvmlDeviceGet{call}: Double trouble")), "{error}");
            remove(&library);
        }
    }

    #[test]
    fn a_driver_that_claims_too_much_is_cut() {
        let Some(library) = double("many", &["-DCOUNT=4000000000u"]) else { return };
        assert_eq!(gpus(library.as_os_str()).unwrap().len(), MAX_GPUS as usize);
        remove(&library);
        // A text without an end, and more bytes in use than there are.
        let Some(library) = double("rude", &["-DRUDE"]) else { return };
        let found = gpus(library.as_os_str()).unwrap().remove(0).unwrap();
        assert_eq!(found.name.len(), TEXT_BYTES as usize - 1);
        assert_eq!(found.used_bytes, found.total_bytes);
        remove(&library);
    }
}
