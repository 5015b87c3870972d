//! Listeners: where they accept, from whom, without headers, and how workers share what comes.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::Socket;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use vestibule::lab::backend::{BackendBehavior, TestBackend};
use vestibule::lab::nlb;

use super::harness::{
    ACME, Conf, GLOBEX, are_read, closed_port, connect, connect_from, end_of, exchange, header, is_reset,
    read,
};

fn conf(acme: &TestBackend) -> Conf {
    Conf { acme: vec![acme.address()], ..Conf::default() }
}

/// One session at this address, of acme's, whose backend is an echo.
async fn is_served(address: SocketAddr) {
    let mut stream = connect(address).await;
    stream.write_all(&[&header(ACME)[..], b"payload"].concat()).await.unwrap();
    assert_eq!(exchange(stream).await.unwrap(), b"payload", "{address}");
}

#[tokio::test]
async fn listeners_accept_on_all_their_addresses_in_both_families() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let proxy = Conf {
        listener: r#"bind = ["127.0.0.1:0", "127.0.0.2:0", "[::1]:0"]
            trusted-sources = ["127.0.0.0/8", "::1"]"#
            .to_owned(),
        more: r#"[[listener]]
            name = "second"
            bind = "127.0.0.1:0"
            trusted-sources = ["127.0.0.1"]"#
            .to_owned(),
        ..conf(&acme)
    };
    let proxy = proxy.start().await;
    let web = proxy.server().addresses("web");
    let ips: Vec<_> = web.iter().map(SocketAddr::ip).collect();
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    assert_eq!(ips, [localhost, [127, 0, 0, 2].into(), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    assert!(web.iter().all(|address| address.port() != 0), "{web:?}");
    for address in &web {
        is_served(*address).await;
    }
    is_served(proxy.address("second")).await;
    assert!(proxy.server().addresses("third").is_empty());

    proxy.metric("vestibule_connections_accepted_total", &[("listener", "web")]).is(3).await;
    proxy.metric("vestibule_connections_accepted_total", &[("listener", "second")]).is(1).await;
    proxy.ended(&[("listener", "web"), ("tenant", "acme"), ("why", "done")]).is(3).await;
    proxy.ended(&[("listener", "second"), ("tenant", "acme"), ("why", "done")]).is(1).await;
    let log = proxy.finish_with_log().await;
    assert_eq!(log.iter().filter(|line| line["peer"].as_str().unwrap().starts_with("[::1]:")).count(), 1);
}

/// So many ports in a row, kept from everybody who does not share them.
fn ports_in_a_row(count: u16) -> (u16, Vec<Socket>) {
    for _ in 0..1000 {
        // Below the ports that the system gives to clients: there are few in a row among those.
        let first = fastrand::u16(10_000..32_000);
        let kept: Option<Vec<_>> = (first..first + count).map(|port| Some(closed_port(port)?.0)).collect();
        if let Some(kept) = kept {
            return (first, kept);
        }
    }
    panic!("no {count} ports in a row are free");
}

#[tokio::test]
async fn port_range_is_bound_from_first_to_last() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let (first, _kept) = ports_in_a_row(5);
    let listener =
        format!("bind = \"127.0.0.1:{}-{}\"\ntrusted-sources = [\"127.0.0.0/8\"]", first + 1, first + 3);
    let proxy = Conf { listener, ..conf(&acme) }.start().await;
    let addresses = proxy.server().addresses("web");
    assert_eq!(addresses, [1, 2, 3].map(|step| SocketAddr::from(([127, 0, 0, 1], first + step))));
    for address in addresses {
        is_served(address).await;
    }
    for beyond in [first, first + 4] {
        let refused = TcpStream::connect(("127.0.0.1", beyond)).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    proxy.ended(&[("listener", "web"), ("tenant", "acme"), ("why", "done")]).is(3).await;
    proxy.finish().await;
}

#[tokio::test]
async fn header_is_accepted_from_trusted_sources_only() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let listener =
        "bind = \"127.0.0.1:0\"\ntrusted-sources = [\"127.0.0.1/32\", \"127.0.0.4/31\"]".to_owned();
    let proxy = Conf { listener, ..conf(&acme) }.start().await;
    for stranger in ["127.0.0.2", "127.0.0.3", "127.0.0.6"] {
        let mut silent = connect_from(stranger, proxy.address("web")).await;
        assert_eq!(end_of(&mut silent).await.unwrap(), 0, "a plain close: nothing was read");
        let mut forger = connect_from(stranger, proxy.address("web")).await;
        // It may be closed before it has sent: then sending fails or the end is plain.
        let sent = forger.write_all(&header(ACME)).await;
        assert!(sent.is_err() || end_of(&mut forger).await.unwrap_or(0) == 0);
    }
    let untrusted = [("tenant", ""), ("by", "proxy"), ("at", "accept"), ("why", "untrusted_source")];
    proxy.ended(&untrusted).is(6).await;
    assert_eq!(acme.sessions(), 0, "a backend heard of it");

    for trusted in ["127.0.0.1", "127.0.0.4", "127.0.0.5"] {
        let mut stream = connect_from(trusted, proxy.address("web")).await;
        stream.write_all(&[&header(ACME)[..], b"payload"].concat()).await.unwrap();
        assert_eq!(exchange(stream).await.unwrap(), b"payload", "{trusted}");
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(3).await;
    proxy.others_are_unharmed().await;
    let log = proxy.finish_with_log().await;
    let mut rejected: Vec<_> = log
        .iter()
        .filter(|line| line["outcome"]["why"] == "untrusted_source")
        .map(|line| line["peer"].as_str().unwrap().split(':').next().unwrap())
        .collect();
    rejected.sort_unstable();
    assert_eq!(rejected, ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3", "127.0.0.6", "127.0.0.6"]);
}

#[tokio::test]
async fn without_headers_the_tenant_is_fixed_and_the_server_may_speak_first() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Greeting).await.unwrap();
    let more = r#"[[listener]]
        name = "raw"
        bind = "127.0.0.1:0"
        proxy-protocol = "off"
        tenant = "acme"
        [[listener]]
        name = "guarded"
        bind = "127.0.0.1:0"
        proxy-protocol = "off"
        tenant = "initech"
        trusted-sources = ["127.0.0.1"]"#;
    let proxy = Conf { more: more.to_owned(), ..conf(&acme) }.start().await;

    let mut stream = connect(proxy.address("raw")).await;
    assert_eq!(read(&mut stream, 7).await, b"acme-1\n");
    let client = stream.local_addr().unwrap().to_string();
    assert_eq!(exchange(stream).await.unwrap(), b"");
    let line = proxy.logged("done").await;
    assert_eq!((line["client"].as_str(), line["peer"].as_str()), (Some(&client[..]), Some(&client[..])));
    assert!(line.get("endpoint").is_none(), "{line}");

    // A header is payload there, whatever it claims.
    let claim = header(GLOBEX);
    let mut stream = connect(proxy.address("raw")).await;
    stream.write_all(&claim).await.unwrap();
    assert_eq!(exchange(stream).await.unwrap(), [b"acme-1\n", &claim[..]].concat());
    // Whoever asks for trust gets it without headers too.
    let mut stranger = connect_from("127.0.0.2", proxy.address("guarded")).await;
    assert_eq!(end_of(&mut stranger).await.unwrap(), 0);
    // A reset may come before connect has returned.
    match TcpStream::connect(proxy.address("guarded")).await {
        Ok(mut stream) => is_reset(&mut stream).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }

    proxy.ended(&[("listener", "raw"), ("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.ended(&[("listener", "guarded"), ("why", "untrusted_source")]).is(1).await;
    proxy.ended(&[("listener", "guarded"), ("tenant", "initech"), ("why", "tenant_disabled")]).is(1).await;
    proxy.ended(&[("tenant", "globex")]).is(0).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
}

#[tokio::test]
async fn silent_client_takes_no_pending_slot_with_proxy_protocol_off() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Mute).await.unwrap();
    let more = "[[listener]]\nname = \"raw\"\nbind = \"127.0.0.1:0\"\nproxy-protocol = \"off\"\n\
                tenant = \"acme\"\nmax-pending = 1";
    let conf = Conf { more: more.to_owned(), timeouts: "header = \"1s\"".to_owned(), ..conf(&acme) };
    let proxy = conf.start().await;
    let raw = proxy.address("raw");
    let silent = [connect(raw).await, connect(raw).await];
    proxy.metric("vestibule_sessions_active", &[("listener", "raw"), ("tenant", "acme")]).is(2).await;
    // The header's time passes for one that owes a header, and not for these.
    assert_eq!(end_of(&mut proxy.connect().await).await.unwrap(), 0);
    proxy.ended(&[("why", "header_timeout")]).is(1).await;
    proxy.metric("vestibule_sessions_active", &[("listener", "raw")]).is(2).await;
    for mut stream in silent {
        stream.write_all(b"at last").await.unwrap();
        are_read([&stream]).await;
        assert_eq!(exchange(stream).await.unwrap(), b"");
    }
    proxy.ended(&[("listener", "raw"), ("tenant", "acme"), ("why", "done")]).is(2).await;
    proxy.others_are_unharmed().await;
    proxy.finish().await;
    assert_eq!(acme.received(), 14);
}

#[tokio::test]
async fn headers_of_both_families_are_taken_on_either() {
    let acme = TestBackend::start("acme-1", BackendBehavior::Echo).await.unwrap();
    let listener =
        "bind = [\"127.0.0.1:0\", \"[::1]:0\"]\ntrusted-sources = [\"127.0.0.1\", \"::1\"]".to_owned();
    let proxy = Conf { listener, ..conf(&acme) }.start().await;
    let v6 = nlb::header("[fd00::7]:40000".parse().unwrap(), "[fd00::1]:80".parse().unwrap(), Some(ACME));
    for address in proxy.server().addresses("web") {
        for bytes in [&v6, &header(ACME)] {
            let mut stream = connect(address).await;
            stream.write_all(&[&bytes[..], b"payload"].concat()).await.unwrap();
            assert_eq!(exchange(stream).await.unwrap(), b"payload");
        }
    }
    proxy.ended(&[("tenant", "acme"), ("why", "done")]).is(4).await;
    let log = proxy.finish_with_log().await;
    let mut clients: Vec<_> = log.iter().map(|line| line["client"].as_str().unwrap()).collect();
    clients.sort_unstable();
    assert_eq!(clients, ["10.100.0.10:40000", "10.100.0.10:40000", "[fd00::7]:40000", "[fd00::7]:40000"]);
}
