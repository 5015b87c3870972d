//! What the bytes say that come back from a probed backend, without any I/O.

use std::ops::RangeInclusive;
use std::task::Poll;

use memchr::memmem;

use crate::account::ProbeResult;
use crate::config::ProbeCheck;

/// Bytes that are read of an HTTP answer, interim responses included.
pub const MOST_OF_HEAD: usize = 16 * 1024;

/// Bytes that are read of an exchange.
pub const MOST_OF_EXCHANGE: usize = 64 * 1024;

/// Matches a response that arrives in pieces. The result does not depend on how it is split.
#[derive(Debug)]
pub struct ProbeResponse<'a> {
    form: ExpectedResponse<'a>,
    /// Bytes that may still come.
    left: usize,
    is_silent: bool,
}

#[derive(Debug)]
enum ExpectedResponse<'a> {
    Http(HttpResponse<'a>),
    Contains(BytesSearch<'a>),
    /// What is missing of the beginning.
    Begins(&'a [u8]),
}

impl<'a> ProbeResponse<'a> {
    /// The answer to a question; `None` where it needs none.
    #[must_use]
    pub fn new(ask: &'a ProbeCheck) -> Option<Self> {
        let (form, left) = match ask {
            ProbeCheck::Connect => return None,
            ProbeCheck::Http { expect_status, .. } => {
                (ExpectedResponse::Http(HttpResponse::new(expect_status)), MOST_OF_HEAD)
            }
            ProbeCheck::Exchange { expect, prefix: true, .. } => {
                (ExpectedResponse::Begins(expect), MOST_OF_EXCHANGE)
            }
            ProbeCheck::Exchange { expect, prefix: false, .. } => {
                (ExpectedResponse::Contains(BytesSearch::new(expect)), MOST_OF_EXCHANGE)
            }
        };
        Some(Self { form, left, is_silent: true })
    }

    /// Takes in the next bytes. After a verdict there is nothing more to take in.
    pub fn feed(&mut self, bytes: &[u8]) -> Poll<ProbeResult> {
        let bytes = bytes.get(..self.left).unwrap_or(bytes);
        self.left -= bytes.len();
        self.is_silent &= bytes.is_empty();
        let verdict = match &mut self.form {
            ExpectedResponse::Http(http) => http.feed(bytes),
            ExpectedResponse::Contains(search) => search.feed(bytes),
            ExpectedResponse::Begins(missing) => begin(missing, bytes),
        };
        if verdict.is_pending() && self.left == 0 {
            return Poll::Ready(ProbeResult::AnswerTooLong);
        }
        verdict
    }

    /// What it means that the backend sends no more.
    #[must_use]
    pub fn end(&self) -> ProbeResult {
        match self.form {
            ExpectedResponse::Contains(_) if !self.is_silent => ProbeResult::UnexpectedAnswer,
            ExpectedResponse::Contains(_) | ExpectedResponse::Begins(_) | ExpectedResponse::Http(_) => {
                ProbeResult::Closed
            }
        }
    }
}

fn begin(missing: &mut &[u8], bytes: &[u8]) -> Poll<ProbeResult> {
    let (next, after) = missing.split_at(missing.len().min(bytes.len()));
    if !bytes.starts_with(next) {
        return Poll::Ready(ProbeResult::UnexpectedAnswer);
    }
    *missing = after;
    if after.is_empty() { Poll::Ready(ProbeResult::Passed) } else { Poll::Pending }
}

/// An HTTP/1 response. What is no HTTP is told at its first bytes; a status counts as soon as the head is whole, for a
/// server that hangs in the middle of its head serves no request. The body is not read: it may be endless.
#[derive(Debug)]
struct HttpResponse<'a> {
    expected: &'a [RangeInclusive<u16>],
    head: Vec<u8>,
    /// The bytes of it that were searched for its end.
    searched: usize,
    /// Whether nothing stands on the line that the search is in.
    is_blank: bool,
}

impl<'a> HttpResponse<'a> {
    fn new(expected: &'a [RangeInclusive<u16>]) -> Self {
        Self { expected, head: Vec::new(), searched: 0, is_blank: false }
    }

    fn feed(&mut self, bytes: &[u8]) -> Poll<ProbeResult> {
        self.head.extend_from_slice(bytes);
        loop {
            if let Some(verdict) = opening(&self.head) {
                return Poll::Ready(verdict);
            }
            let Some(len) = self.find_end() else { return Poll::Pending };
            let rest = self.head.split_off(len);
            let Some(status) = status(&self.head) else { return Poll::Ready(ProbeResult::AnswerMalformed) };
            if self.expected.iter().any(|range| range.contains(&status)) {
                return Poll::Ready(ProbeResult::Passed);
            }
            // An interim response, which a client has to skip (RFC 9110, 15.2); after 101 no other would follow.
            if !matches!(status, 100 | 102..=199) {
                return Poll::Ready(ProbeResult::UnexpectedStatus);
            }
            (self.head, self.searched, self.is_blank) = (rest, 0, false);
        }
    }

    /// How long the head is; `None` where it is not whole.
    fn find_end(&mut self) -> Option<usize> {
        for byte in self.head.iter().skip(self.searched) {
            self.searched += 1;
            match byte {
                b'\n' if self.is_blank => return Some(self.searched),
                b'\n' => self.is_blank = true,
                b'\r' => {}
                _ => self.is_blank = false,
            }
        }
        None
    }
}

/// What the first bytes say where they are not those of an HTTP/1 response.
fn opening(bytes: &[u8]) -> Option<ProbeResult> {
    match bytes {
        // An alert, or a handshake, of SSL 3.0 to TLS 1.3 (RFC 8446, 5.1).
        [0x15 | 0x16] => None,
        [0x15 | 0x16, 0x03, ..] => Some(ProbeResult::AnswerTls),
        _ if bytes.iter().zip(b"HTTP/1.").all(|(byte, expected)| byte == expected) => None,
        _ => Some(ProbeResult::AnswerMalformed),
    }
}

/// The status of a whole head; `None` where it is malformed.
fn status(head: &[u8]) -> Option<u16> {
    // A header takes a line at least, so that none is too many.
    let lines = head.split(|byte| *byte == b'\n').count();
    let mut headers = vec![httparse::EMPTY_HEADER; lines];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = httparse::ParserConfig::default()
        // A client has to understand it (RFC 9112, 5.2).
        .allow_obsolete_multiline_headers_in_responses(true)
        .parse_response(&mut response, head);
    parsed.ok().filter(httparse::Status::is_complete)?;
    response.code
}

/// Finds bytes in a stream of pieces.
#[derive(Debug)]
struct BytesSearch<'a> {
    wanted: &'a [u8],
    /// The last bytes so far, fewer than `wanted`: it may begin in them.
    tail: Vec<u8>,
}

impl<'a> BytesSearch<'a> {
    fn new(wanted: &'a [u8]) -> Self {
        Self { wanted, tail: Vec::new() }
    }

    fn feed(&mut self, bytes: &[u8]) -> Poll<ProbeResult> {
        self.tail.extend_from_slice(bytes);
        if memmem::find(&self.tail, self.wanted).is_some() {
            return Poll::Ready(ProbeResult::Passed);
        }
        self.tail.drain(..(self.tail.len() + 1).saturating_sub(self.wanted.len()));
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Protocol;

    fn http() -> ProbeCheck {
        let expect_status = vec![200..=299, 404..=404];
        ProbeCheck::Http { path: "/".to_owned(), host: None, expect_status }
    }

    fn exchange(expect: &[u8], prefix: bool) -> ProbeCheck {
        ProbeCheck::Exchange { protocol: Protocol::Tcp, send: Vec::new(), expect: expect.to_vec(), prefix }
    }

    /// What comes of pieces; where they do not decide, what comes of the end after them.
    fn verdict<'p>(ask: &ProbeCheck, pieces: impl IntoIterator<Item = &'p [u8]>) -> (ProbeResult, bool) {
        let mut answer = ProbeResponse::new(ask).unwrap();
        for piece in pieces {
            if let Poll::Ready(verdict) = answer.feed(piece) {
                return (verdict, true);
            }
        }
        (answer.end(), false)
    }

    /// The verdict of bytes that decide, in one piece and byte by byte.
    #[track_caller]
    fn decides(ask: &ProbeCheck, bytes: &[u8], expected: ProbeResult) {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
        assert_eq!(verdict(ask, [bytes]), (expected, true), "{shown}");
        assert_eq!(verdict(ask, bytes.chunks(1)), (expected, true), "{shown}, byte by byte");
    }

    #[track_caller]
    fn ends(ask: &ProbeCheck, bytes: &[u8], expected: ProbeResult) {
        assert_eq!(verdict(ask, [bytes]), (expected, false), "{}", String::from_utf8_lossy(bytes));
        assert_eq!(verdict(ask, bytes.chunks(1)), (expected, false), "byte by byte");
    }

    #[test]
    fn status_counts_once_the_head_is_complete() {
        for (status, expected) in [
            ("200 OK", ProbeResult::Passed),
            ("200", ProbeResult::Passed),
            ("299 ", ProbeResult::Passed),
            ("404 Not Found", ProbeResult::Passed),
            ("400 Bad Request", ProbeResult::UnexpectedStatus),
            ("300 Multiple Choices", ProbeResult::UnexpectedStatus),
            ("503 Service Unavailable", ProbeResult::UnexpectedStatus),
        ] {
            for version in ["HTTP/1.0", "HTTP/1.1"] {
                for end in ["\r\n", "\n"] {
                    let head = format!("{version} {status}{end}A: b{end}folded:{end} c{end}{end}");
                    decides(&http(), head.as_bytes(), expected);
                    decides(&http(), format!("{head}body\r\n\r\n").as_bytes(), expected);
                    ends(&http(), &head.as_bytes()[..head.len() - 1], ProbeResult::Closed);
                }
                decides(&http(), format!("{version} {status}\r\n\r\n").as_bytes(), expected);
            }
        }
        assert!(ProbeResponse::new(&ProbeCheck::Connect).is_none());
    }

    #[test]
    fn non_http_response_is_detected_at_its_first_bytes() {
        for garbage in [
            &b"\0"[..],
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"\r\nHTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/2.0 200 OK\r\n\r\n",
            b"HTTP/1.7 200 OK\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: b\r\n\r\r\n",
            b"HTTP/1.1 \n\r\n",
            b"\x15\x02",
        ] {
            decides(&http(), garbage, ProbeResult::AnswerMalformed);
        }
        decides(&http(), b"\x15\x03\x01\0\x02\x02\x46", ProbeResult::AnswerTls);
        decides(&http(), b"\x16\x03", ProbeResult::AnswerTls);
        for open in [&b""[..], b"\x15", b"H", b"HTTP/1.", b"HTTP/1.1 200 OK\r\n"] {
            ends(&http(), open, ProbeResult::Closed);
        }
    }

    #[test]
    fn interim_responses_are_skipped_within_the_bound() {
        let interim = &b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"[..];
        let after = |count: usize, last: &str| [&interim.repeat(count)[..], last.as_bytes()].concat();
        decides(&http(), &after(3, "HTTP/1.1 200 OK\r\n\r\n"), ProbeResult::Passed);
        decides(&http(), &after(1, "HTTP/1.1 500 No\r\n\r\n"), ProbeResult::UnexpectedStatus);
        decides(&http(), &after(1, "no HTTP"), ProbeResult::AnswerMalformed);
        ends(&http(), &after(1, "HTTP/1.1 200 OK\r\n"), ProbeResult::Closed);
        let most = MOST_OF_HEAD / interim.len();
        decides(&http(), &after(most + 1, "HTTP/1.1 200 OK\r\n\r\n"), ProbeResult::AnswerTooLong);
        let switching = b"HTTP/1.1 101 Switching Protocols\r\n\r\n";
        decides(&http(), switching, ProbeResult::UnexpectedStatus);
        let expect_status = vec![101..=101];
        let ask = ProbeCheck::Http { path: "/".to_owned(), host: None, expect_status };
        decides(&ask, switching, ProbeResult::Passed);
    }

    #[test]
    fn response_head_is_bounded() {
        let head = |len: usize| {
            let mut head = b"HTTP/1.1 200 OK\r\na: ".to_vec();
            head.resize(len - 4, b'x');
            [&head[..], b"\r\n\r\n"].concat()
        };
        decides(&http(), &head(MOST_OF_HEAD), ProbeResult::Passed);
        decides(&http(), &head(MOST_OF_HEAD + 1), ProbeResult::AnswerTooLong);
        let many = [b"HTTP/1.1 200 OK\n", &b"a:\n".repeat(5_000)[..], b"\n"].concat();
        decides(&http(), &many, ProbeResult::Passed);
    }

    #[test]
    fn answer_must_begin_with_the_expected_prefix() {
        let ask = exchange(b"+PONG", true);
        decides(&ask, b"+PONG", ProbeResult::Passed);
        decides(&ask, b"+PONG\r\n", ProbeResult::Passed);
        decides(&ask, b"-", ProbeResult::UnexpectedAnswer);
        decides(&ask, b"+PINGPONG", ProbeResult::UnexpectedAnswer);
        ends(&ask, b"", ProbeResult::Closed);
        ends(&ask, b"+PON", ProbeResult::Closed);
    }

    #[test]
    fn response_must_contain_the_expected_bytes() {
        let ask = exchange(b"aab", false);
        decides(&ask, b"aab", ProbeResult::Passed);
        decides(&ask, b"xaaaab", ProbeResult::Passed);
        decides(&ask, b"aacaabx", ProbeResult::Passed);
        ends(&ask, b"aacab", ProbeResult::UnexpectedAnswer);
        ends(&ask, b"", ProbeResult::Closed);
        let mut long = vec![b'a'; MOST_OF_EXCHANGE];
        decides(&ask, &long, ProbeResult::AnswerTooLong);
        *long.last_mut().unwrap() = b'b';
        decides(&ask, &long, ProbeResult::Passed);
        decides(&ask, &[b"a", &long[..]].concat(), ProbeResult::AnswerTooLong);
    }

    fn fragment() -> impl Strategy<Value = Vec<u8>> {
        let spoken = [
            &b"HTTP/1.1 100 Continue\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 503 No\n",
            b"HTTP/1.",
            b"a: b\r\n",
            b" folded\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"\x15",
            b"\x03",
            b"ab",
            b"abab",
            b"abc",
        ];
        let spoken = proptest::sample::select(spoken.to_vec()).prop_map(<[u8]>::to_vec);
        prop_oneof![
            8 => spoken,
            1 => proptest::collection::vec(any::<u8>(), 0..9),
            1 => (1_usize..9_000).prop_map(|len| vec![b'x'; len]),
        ]
    }

    fn question() -> impl Strategy<Value = ProbeCheck> {
        let expect = proptest::sample::select(vec!["ababc", "ab", "abab", "HTTP/1.1 200", "x"]);
        let exchange =
            (expect, any::<bool>()).prop_map(|(expect, prefix)| exchange(expect.as_bytes(), prefix));
        prop_oneof![Just(http()), exchange]
    }

    proptest! {
        #[test]
        fn no_split_changes_the_probe_result(
            ask in question(),
            fragments in proptest::collection::vec(fragment(), 0..12),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
        ) {
            let bytes = fragments.concat();
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]);
            let whole = verdict(&ask, [&bytes[..]]);
            prop_assert_eq!(whole, verdict(&ask, pieces));
            prop_assert_eq!(whole, verdict(&ask, bytes.chunks(1)));
        }

        #[test]
        fn contained_bytes_are_found(text in "[ab]{0,40}", wanted in "[ab]{1,6}", size in 1_usize..9) {
            let found = verdict(&exchange(wanted.as_bytes(), false), text.as_bytes().chunks(size));
            prop_assert_eq!(found == (ProbeResult::Passed, true), text.contains(&wanted));
            let begins = verdict(&exchange(wanted.as_bytes(), true), text.as_bytes().chunks(size));
            prop_assert_eq!(begins == (ProbeResult::Passed, true), text.starts_with(&wanted));
        }
    }
}
