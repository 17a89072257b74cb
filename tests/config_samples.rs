//! The samples in `config/` are read by the real loader and set what they claim to set.

use actd::config::{Config, Level, Loaded, load};
use std::path::Path;

fn samples() -> Vec<(String, Config)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut samples = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder of samples") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        let args = [format!("--config-file={}", path.display())];
        match load(args, [], |path| std::fs::read_to_string(path)) {
            Ok(Loaded::Run(config, notices)) => {
                let bad = notices.iter().find(|notice| notice.level > Level::Warn);
                assert!(bad.is_none(), "{name}: {bad:?}");
                samples.push((name, *config));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    samples
}

#[test]
fn every_sample_loads() {
    let names: Vec<_> = samples().into_iter().map(|(name, _)| name).collect();
    for expected in ["single.yml", "tuned.yml"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not in {names:?}");
    }
}

/// Unknown keys are ignored, so a misspelt one would go unnoticed.
#[test]
fn samples_name_only_known_settings() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    for (name, _) in samples() {
        let text = std::fs::read_to_string(folder.join(&name)).expect("readable");
        let document: serde_json::Value = serde_saphyr::from_str(&text).expect("YAML");
        for key in document.as_object().expect("a mapping").keys() {
            let known = actd::config::flags::all().any(|flag| flag.key.split('.').next() == Some(key.as_str()));
            assert!(known, "{name}: {key}");
        }
    }
}

#[test]
fn the_tuned_sample_is_tuned() {
    let (_, config) = samples().into_iter().find(|(name, _)| name == "tuned.yml").expect("listed");
    assert_eq!(config.quota(), Some(4 << 30));
    assert_eq!(config.server_pings().map(|(every, within)| (every.as_secs(), within.as_secs())), Some((600, 20)));
    assert_eq!(config.listen_client_urls.len(), 2);
    assert_eq!(config.slow_unary_request().as_millis(), 500);
}
