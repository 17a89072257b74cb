//! Asks the DNS for the first members (`cluster::srv` says what its records mean).

use std::collections::BTreeMap;

use crate::{
    cluster::{
        bootstrap::InitialCluster,
        srv::{self, Advertised, Record},
    },
    config::{Config, Url},
};

use super::dns::{self, Resolver};

/// The members that the records of `--discovery-srv` name. The error is the reason alone.
pub async fn initial_cluster(config: &Config, resolver: &Resolver) -> Result<InitialCluster, String> {
    let mut answers = Vec::new();
    for (scheme, service) in srv::services(&config.discovery_srv_name) {
        let found = members(config, resolver, scheme, &service).await;
        match &found {
            Ok(members) => tracing::info!(service, members = members.join(","), "members of DNS SRV records"),
            Err(reason) => tracing::info!(service, reason, "no members of DNS SRV records"),
        }
        answers.push(found);
    }
    let list = srv::list(answers)?;
    let parse_url = |text: &str| Url::parse(text).map(|url| url.to_string());
    match InitialCluster::parse(&list, parse_url) {
        Ok(cluster) if list.is_empty() || cluster.has_member(&config.name) => Ok(cluster),
        _ => Err(format!("cannot find local etcd member {:?} in SRV records", config.name)),
    }
}

async fn members(config: &Config, resolver: &Resolver, scheme: &str, service: &str) -> Result<Vec<String>, String> {
    let mut advertised = Vec::new();
    for url in &config.initial_advertise_peer_urls {
        advertised.push(Advertised {
            address: dns::address(url.authority()).await?.to_string(),
            scheme: url.scheme().to_string(),
            url: url.to_string(),
        });
    }
    let name = format!("_{service}._tcp.{}", config.discovery_srv);
    let records = resolver.srv(&name).await.map_err(|reason| srv::failed(service, &reason))?;
    let mut addresses = BTreeMap::new();
    for record in &records {
        addresses.insert(record.clone(), dns::address(&record.host_and_port()).await.map(|found| found.to_string()));
    }
    let resolve = |record: &Record| addresses[record].clone();
    srv::members((scheme, service), &config.name, &advertised, &records, resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::dns::tests::{asking, name_server};

    fn config(name: &str, suffix: &str, peer_url: &str) -> Config {
        Config {
            name: name.into(),
            discovery_srv: "example.org".into(),
            discovery_srv_name: suffix.into(),
            initial_advertise_peer_urls: vec![Url::parse(peer_url).unwrap()],
            ..Config::default()
        }
    }

    #[tokio::test]
    async fn the_first_members_are_those_of_the_domains_records() {
        // limits.md 17
        let server = name_server(
            &[
                ("_etcd-server._tcp.example.org", &[(0, "localhost", 1), (0, "localhost", 2), (0, "localhost", 3)]),
                ("_etcd-server-ssl-x._tcp.example.org", &[(0, "localhost", 5)]),
                ("_etcd-server-x._tcp.example.org", &[(0, "localhost", 6), (0, "", 7)]),
            ],
            512,
        )
        .await;
        let resolver = asking(&[server]);
        let ask = async |name: &str, suffix: &str, peer_url: &str| {
            initial_cluster(&config(name, suffix, peer_url), &resolver).await.map(|cluster| cluster.to_string())
        };
        // The own record is found by its address, whatever the URL's host is called.
        for peer_url in ["http://localhost:2", "http://127.0.0.1:2"] {
            let found = ask("me", "", peer_url).await.unwrap();
            assert_eq!(found, "0=http://localhost:1,1=http://localhost:3,me=http://localhost:2");
        }
        assert_eq!(
            ask("me", "", "http://127.0.0.1:9").await.unwrap_err(),
            r#"cannot find local etcd member "me" in SRV records"#
        );
        assert_eq!(ask("me", "x", "http://localhost:6").await.unwrap(), "0=https://localhost:5,me=http://localhost:6");
        assert_eq!(ask("me", "x", "https://localhost:5").await.unwrap(), "0=http://localhost:6,me=https://localhost:5");
        assert_eq!(
            ask("me", "y", "http://localhost:2").await.unwrap_err(),
            format!(
                "error querying DNS SRV records for _etcd-server-ssl-y lookup _etcd-server-ssl-y._tcp.example.org on \
                 {server}: no such host\nerror querying DNS SRV records for _etcd-server-y lookup \
                 _etcd-server-y._tcp.example.org on {server}: no such host"
            )
        );
    }

    #[tokio::test]
    async fn an_own_url_without_address_is_an_error() {
        let server = name_server(&[("_etcd-server._tcp.example.org", &[(0, "localhost", 1)])], 512).await;
        let error =
            initial_cluster(&config("me", "", "http://nobody.invalid:1"), &asking(&[server])).await.unwrap_err();
        assert!(error.starts_with("lookup nobody.invalid: "), "{error}");
    }
}
