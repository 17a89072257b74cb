//! The samples in `config/` are read by the real loader and set what they claim to set.

use actd::config::{Config, Level, Loaded, load};
use std::path::Path;

fn samples() -> Vec<(String, Config)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut samples = Vec::new();
    let entries =
        [folder.clone(), folder.join("three-node")].map(|f| std::fs::read_dir(f).expect("a folder of samples"));
    for entry in entries.into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.strip_prefix(&folder).expect("below it").to_string_lossy().into_owned();
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
    for expected in ["single.yml", "tuned.yml", "three-node/a.yml", "three-node/b.yml", "three-node/c.yml"] {
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

#[test]
fn the_three_samples_make_one_cluster() {
    use actd::cluster::bootstrap::InitialCluster;
    let mut ids = std::collections::BTreeSet::new();
    for name in ["three-node/a.yml", "three-node/b.yml", "three-node/c.yml"] {
        let (_, config) = samples().into_iter().find(|(of, _)| of == name).expect("listed");
        let initial = InitialCluster::parse(&config.initial_cluster, |url| Ok(url.to_owned())).expect("a list");
        let own: Vec<String> = config.initial_advertise_peer_urls.iter().map(ToString::to_string).collect();
        initial.validate(&config.name, &own, str::to_owned).expect("its own URLs are in the list");
        let founding = initial.found(&config.initial_cluster_token);
        ids.insert(founding.cluster_id);
        assert_eq!(founding.members.len(), 3);
    }
    assert_eq!(ids.len(), 1);
}
