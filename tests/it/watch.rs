//! `[process] watch`: files that change are put in force by themselves, however they are replaced.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::harness::{ACME, GLOBEX, STRANGER, exchange, is_reset};
use super::process::{DRAIN_NEVER, Serve, World, Written};

const DONE: &str = "vestibule_config_reloads_total";
const REFUSED: &str = "vestibule_config_rejected_total";

async fn is_served(serve: &Serve, endpoint: &str) {
    assert_eq!(exchange(serve.open(endpoint, b"x").await).await.unwrap(), b"x");
}

fn watching(world: &World, more: &str) -> Written {
    let config = world.config(&format!("watch = true\n{DRAIN_NEVER}"));
    let text = fs::read_to_string(&config.path).unwrap();
    fs::write(&config.path, format!("{more}\n{text}")).unwrap();
    config
}

fn tenant(name: &str) -> String {
    format!("[[tenant]]\nname = \"{name}\"\nendpoints = [\"{STRANGER}\"]\npool = \"globex\"\n")
}

#[tokio::test]
async fn written_or_replaced_file_is_applied_and_a_faulty_one_is_not() {
    let world = World::new().await;
    let config = watching(&world, "");
    let mut serve = Serve::start(&config).await;
    is_reset(&mut serve.open(STRANGER, b"x").await).await;
    let text = fs::read_to_string(&config.path).unwrap();
    // Written in place.
    fs::write(&config.path, format!("{text}{}", tenant("hooli"))).unwrap();
    serve.counts(DONE, &[], 1).await;
    is_served(&serve, STRANGER).await;
    // With a fault: what was in force stays, and the log says why.
    fs::write(&config.path, format!("{text}{}", tenant("acme"))).unwrap();
    serve.counts(REFUSED, &[], 1).await;
    is_served(&serve, STRANGER).await;
    serve.says("reload refused; the configuration in force stays").await;
    // Replaced by rename, as editors do. The next change is the next attempt.
    let next = config.beside("next");
    fs::write(&next, &text).unwrap();
    fs::rename(&next, &config.path).unwrap();
    serve.counts(DONE, &[], 2).await;
    is_reset(&mut serve.open(STRANGER, b"x").await).await;
    for endpoint in [ACME, GLOBEX] {
        is_served(&serve, endpoint).await;
    }
    // Something else in the same folder is no change.
    fs::write(config.beside("notes.txt"), "x").unwrap();
    fs::write(&config.path, format!("{text}# the end\n")).unwrap();
    serve.counts(DONE, &[], 3).await;
    serve.has(REFUSED, &[], 1).await;
    serve.end().await;
}

#[tokio::test]
async fn files_that_a_pattern_names_come_and_go() {
    let world = World::new().await;
    let config = watching(&world, "include = [\"tenants.d/*.toml\"]");
    let mut serve = Serve::start(&config).await;
    // The folder comes later, too.
    let folder = config.beside("tenants.d");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("hooli.toml"), tenant("hooli")).unwrap();
    serve.counts(DONE, &[], 1).await;
    is_served(&serve, STRANGER).await;
    fs::write(folder.join("hooli.toml"), tenant("hooli-2")).unwrap();
    serve.counts(DONE, &[], 2).await;
    fs::remove_file(folder.join("hooli.toml")).unwrap();
    serve.counts(DONE, &[], 3).await;
    is_reset(&mut serve.open(STRANGER, b"x").await).await;
    serve.end().await;
}

#[tokio::test]
async fn replaced_symbolic_link_is_a_change() {
    // As Kubernetes mounts a ConfigMap.
    let world = World::new().await;
    let config = watching(&world, "");
    let text = fs::read_to_string(&config.path).unwrap();
    let version = |name: &str, text: &str| {
        fs::create_dir(config.beside(name)).unwrap();
        fs::write(config.beside(name).join("vestibule.toml"), text).unwrap();
    };
    version("..1", &text);
    fs::remove_file(&config.path).unwrap();
    symlink("..1", config.beside("..data")).unwrap();
    symlink(Path::new("..data/vestibule.toml"), &config.path).unwrap();
    let mut serve = Serve::start(&config).await;
    for (number, more) in (2..).zip([tenant("hooli"), String::new(), tenant("hooli")]) {
        version(&format!("..{number}"), &format!("{text}{more}"));
        symlink(format!("..{number}"), config.beside("..next")).unwrap();
        fs::rename(config.beside("..next"), config.beside("..data")).unwrap();
        fs::remove_dir_all(config.beside(&format!("..{}", number - 1))).unwrap();
        serve.counts(DONE, &[], number - 1).await;
    }
    is_served(&serve, STRANGER).await;
    serve.has(REFUSED, &[], 0).await;
    serve.end().await;
}
