//! What each fuzz target does with an input. A target panics if a rule is broken.

use std::task::Poll;

use vestibule::account::ProbeResult;
use vestibule::config::{Config, ProbeCheck, Protocol};
use vestibule::flow::freeze::FrozenFlow;
use vestibule::handover::records::{Transfer, TransferKind};
use vestibule::probe::response::ProbeResponse;
use vestibule::proxy_protocol::{MAX_LEN, ParsedHeader, ParserRules, Transport, parse};

/// A PROXY header. The first byte chooses the parser's rules.
///
/// The result does not depend on the bytes after the header, and each shorter piece of a header is partial.
pub(crate) fn header(input: &[u8]) {
    let Some((choice, input)) = input.split_first() else { return };
    let transport = if choice & 1 == 0 { Transport::Stream } else { Transport::Datagram };
    let rules = ParserRules { transport, verify_crc: choice & 2 == 0 };
    match parse(input, rules) {
        ParsedHeader::Done(header, len) => {
            assert!(len <= input.len() && len <= MAX_LEN);
            assert_eq!(header.as_bytes(), &input[..len]);
            assert_eq!(parse(&input[..len], rules), ParsedHeader::Done(header, len));
            for short in 0..len {
                assert!(
                    matches!(parse(&input[..short], rules), ParsedHeader::Partial(least) if least > short)
                );
            }
            let tlvs = header.tlvs().count();
            assert!(tlvs <= len);
            let _ = (header.addresses(), header.client(), header.endpoint(), header.command());
        }
        ParsedHeader::Partial(least) => assert!(least > input.len() && least <= MAX_LEN),
        ParsedHeader::Malformed(_) => {}
    }
}

/// A record of a session or flow from another process, without its descriptors.
///
/// Each kind of record is refused by the decoder of the other one, and a record that is not JSON by both.
pub(crate) fn transfer_record(input: &[u8]) {
    let transfer = || Transfer { record: input.to_vec(), fds: Vec::new() };
    let flow = transfer().read(TransferKind::Flow);
    if transfer().kind().is_err() {
        assert!(flow.is_err());
    }
    // Without descriptors neither can be complete.
    assert!(transfer().session().is_err());
    assert!(flow.ok().is_none_or(|frozen| FrozenFlow::new(frozen).is_err()));
}

/// The bytes that a probed backend answers. The first byte chooses the check, the second one the size of the pieces.
///
/// The result does not depend on the pieces.
pub(crate) fn probe_response(input: &[u8]) {
    let &[choice, size, ref response @ ..] = input else { return };
    let exchange = |prefix| {
        let (send, expect) = (Vec::new(), b"aab".to_vec());
        ProbeCheck::Exchange { protocol: Protocol::Tcp, send, expect, prefix }
    };
    let check = match choice % 3 {
        0 => ProbeCheck::Http { path: "/".to_owned(), host: None, expect_status: vec![200..=399] },
        1 => exchange(true),
        _ => exchange(false),
    };
    let size = usize::from(size).max(1);
    assert_eq!(result(&check, response.chunks(response.len().max(1))), result(&check, response.chunks(size)));
}

/// The result of a response in pieces, after which the backend sends no more.
fn result<'a>(check: &ProbeCheck, pieces: impl Iterator<Item = &'a [u8]>) -> Option<ProbeResult> {
    let mut response = ProbeResponse::new(check)?;
    for piece in pieces {
        if let Poll::Ready(result) = response.feed(piece) {
            return Some(result);
        }
    }
    Some(response.end())
}

/// A configuration file. Errors have a text, and the same file has the same result.
pub(crate) fn configuration(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // Includes read the files of the machine.
    if text.contains("include") {
        return;
    }
    match Config::parse("fuzz.toml", text) {
        Ok(config) => assert_eq!(Config::parse("fuzz.toml", text).ok(), Some(config)),
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}
