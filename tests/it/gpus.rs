//! The daemon on a machine whose driver is a double: GPUs are listed, and said not to be used.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::process::{run, until, v4};

/// A folder with the double as `libnvidia-ml.so.1`, as the loader looks for it; `None` where the
/// compiler makes libraries for another machine.
fn driver(home: &Home) -> Option<PathBuf> {
    let machine = Command::new("cc").arg("-dumpmachine").output().expect("cc runs");
    if !String::from_utf8_lossy(&machine.stdout).starts_with(std::env::consts::ARCH) {
        println!("skipped: cc makes libraries for another machine");
        return None;
    }
    let folder = home.beside().join("driver");
    std::fs::create_dir_all(&folder).expect("a folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels-c/tests/nvml_double.c");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-DFAIL_AT=6", "-o"]).arg(folder.join("libnvidia-ml.so.1"));
    assert!(cc.arg(source).status().expect("cc runs").success());
    Some(folder)
}

#[test]
fn gpus_are_listed_and_said_not_to_be_used() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let Some(driver) = driver(&home) else { return };
    let path = driver.to_str().expect("a path in UTF-8");
    let daemon = Daemon::start_with(&home, &[("LD_LIBRARY_PATH", path)]);
    let plan = until("what a runner tells", || {
        let plan = daemon.tcp.post("/api/plan", &json!({"model": "tiny"})).expect(200);
        (plan["devices"].as_array().map_or(0, Vec::len) == 2).then_some(plan)
    });
    assert_eq!((plan["outcome"].clone(), plan["placement"].clone()), (json!("load"), Value::Null));
    let gpu = &plan["devices"][1];
    assert_eq!((&gpu["name"], &gpu["product"]), (&json!("gpu0"), &json!("Double 24")));
    assert_eq!((&gpu["budget_bytes"], &gpu["used_bytes"]), (&json!(0), &json!(0)));
    let text = run(&mut v4(&home, &["plan", "tiny"]), "");
    let why = "gpu0 (Double 24) is not used: this build of v4 has no kernels for it.";
    assert!(text.success().lines().any(|line| line == why), "{text:?}");
    // The second device of the double does not say how much memory it has.
    let complaint = "gpu1: the NVIDIA driver answers to nvmlDeviceGetMemoryInfo: Double trouble";
    assert!(text.stdout.contains(complaint), "{text:?}");
    // It answers as ever, on the host.
    let answer = daemon.generate(&json!({"model": "tiny", "prompt": "a", "stream": false}));
    assert_eq!(answer["done"], json!(true));
    let ps = daemon.tcp.get("/api/ps").expect(200);
    assert_eq!(
        (&ps["models"][0]["size_vram"], &ps["models"][0]["placement"]),
        (&json!(0), &Value::Null)
    );
    assert!(daemon.log().contains("has no kernels for it"), "{}", daemon.log());
}
