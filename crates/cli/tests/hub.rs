//! Models by their names, from a Hub that runs in this process.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};
use support::{Outcome, fixture, line, names, read_metrics};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hub with one model, `org/tiny`.
struct Hub {
    address: String,
    /// What was asked for, in order.
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        // Lives as long as the test does.
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &seen);
            }
        });
        Self { address, requests }
    }

    /// Files asked for since the last call, each once.
    fn take_files(&self) -> Vec<String> {
        let mut paths = std::mem::take(&mut *self.requests.lock().unwrap());
        paths.retain(|path| !path.starts_with("/api/"));
        let mut files: Vec<String> = paths.iter().map(|path| path.rsplit('/').next().unwrap().to_owned()).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// Answers one request as the Hub does, as far as its clients look.
fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, seen: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    seen.lock().unwrap().push(path.clone());
    let range = headers.iter().find_map(|header| header.strip_prefix("range: bytes="));
    let file = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")).and_then(|name| files.get(name));
    let (status, extra, body) = if path == "/api/models/org/tiny/revision/main" {
        let siblings: Vec<Value> = files.keys().map(|name| json!({ "rfilename": name })).collect();
        ("200 OK", String::new(), json!({ "sha": COMMIT, "siblings": siblings }).to_string().into_bytes())
    } else if let (Some(bytes), Some((first, last))) = (file, range.and_then(|range| range.split_once('-'))) {
        let first: usize = first.parse().unwrap();
        let last = last.parse().unwrap_or(bytes.len() - 1);
        let (name, size) = (path.rsplit('/').next().unwrap(), bytes.len());
        let range = format!("Content-Range: bytes {first}-{last}/{size}\r\n");
        let extra = format!("{range}ETag: \"etag-of-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
        ("206 Partial Content", extra, bytes[first..=last].to_vec())
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n", body.len());
    // A client that has seen enough may have gone.
    let _gone = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

/// The files of a fixture's model, the weights in two shards.
fn sharded(name: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = fixture(name).join("model");
    let mut files: BTreeMap<String, Vec<u8>> =
        names(&folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect();
    let whole = files.remove("model.safetensors").unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap().tensors();
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let name = format!("model-{shard}.safetensors");
        let part: Vec<_> = tensors.iter().skip(shard).step_by(2).map(|(name, view)| (name, view)).collect();
        map.extend(part.iter().map(|(tensor, _)| ((*tensor).clone(), json!(name))));
        files.insert(name, safetensors::serialize(part, None).unwrap());
    }
    files.insert("model.safetensors.index.json".to_owned(), json!({ "weight_map": map }).to_string().into_bytes());
    files.insert("README.md".to_owned(), b"# Tiny".to_vec());
    files
}

/// The program in a folder of its own, where the Hub is this one.
fn unsloth(folder: &Path, endpoint: &str, args: &[String]) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_unsloth"))
        .args(args)
        .current_dir(folder)
        .envs([("HF_HOME", folder.join("hf").as_os_str()), ("HF_ENDPOINT", endpoint.as_ref())])
        .output()
        .unwrap();
    Outcome {
        status: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

const NOBODY: &str = "http://127.0.0.1:9";

fn train(output: &str) -> Vec<String> {
    line(
        &format!("train --model org/tiny --data {{}} --output {output} --steps 1 --rank 4"),
        &[&fixture("tiny-llama").join("train.jsonl")],
    )
}

#[test]
fn fetched_once_and_used_from_the_cache() {
    let folder = TempDir::new().unwrap();
    let hub = Hub::start(sharded("tiny-llama"));
    let run = |endpoint: &str, args: &[String]| unsloth(folder.path(), endpoint, args);

    // A plan needs no weights.
    let plan = line("plan --model org/tiny --seq 64 --json", &[]);
    run(&hub.address, &plan).succeeded();
    let files = hub.take_files();
    assert!(files.contains(&"config.json".to_owned()) && !files.iter().any(|name| name.contains("safetensors")));

    run(&hub.address, &train("out")).succeeded();
    let files = hub.take_files();
    assert_eq!(files, ["model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"]);
    let adapter = fs::read(folder.path().join("out/adapter_config.json")).unwrap();
    let adapter: Value = serde_json::from_slice(&adapter).unwrap();
    assert_eq!(adapter["base_model_name_or_path"], "org/tiny");
    assert!(folder.path().join("out/tokenizer.json").is_file());

    // From now on nobody answers.
    run(NOBODY, &train("again")).succeeded();
    let losses = |output: &str| read_metrics(&folder.path().join(output))[0]["loss"].clone();
    assert_eq!(losses("again"), losses("out"));
    let local = fixture("tiny-llama").join("model");
    let generated = |model: &Path| {
        let text = "generate --model {} --adapter out --prompt Licensed --max-new-tokens 5 --json";
        run(NOBODY, &line(text, &[model])).succeeded().json()["tokens"].clone()
    };
    assert_eq!(generated(Path::new("org/tiny")), generated(&local));
    let data = fixture("tiny-llama").join("eval.jsonl");
    run(NOBODY, &line("eval --model org/tiny --data {}", &[&data])).succeeded();
    run(NOBODY, &plan).succeeded();
    assert_eq!(hub.take_files(), [] as [String; 0]);
}

#[test]
fn what_cannot_be_fetched_is_said() {
    let folder = TempDir::new().unwrap();
    let hub = Hub::start(sharded("tiny-llama"));
    let run = |endpoint: &str, name: &str| {
        unsloth(folder.path(), endpoint, &line(&format!("plan --model {name} --seq 8"), &[]))
    };
    let parts = ["is not a folder, and cannot be taken from the Hugging Face Hub"];
    run(&hub.address, "org/other").failed_with(&[&["`org/other`", "404"][..], &parts].concat());
    run(NOBODY, "org/tiny").failed_with(&[&["`org/tiny`"][..], &parts].concat());
    // No name: two parts it has to have.
    run(&hub.address, "tiny").failed_with(&["cannot read", "tiny/config.json"]);
    assert_eq!(hub.take_files(), [] as [String; 0]);
    // A folder is never taken for a name.
    fs::create_dir_all(folder.path().join("org/tiny")).unwrap();
    run(&hub.address, "org/tiny").failed_with(&["cannot read", "org/tiny/config.json"]);
}
