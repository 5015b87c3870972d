//! The values of a JSON line, written straight into the batch: serde's way was a third of what a short connection
//! cost outside the kernel.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A text with its quotes. Names are plain nearly always; the others are serde's.
pub(super) fn quote(to: &mut Vec<u8>, text: &str) {
    let plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
    if text.bytes().all(plain) {
        to.push(b'"');
        to.extend_from_slice(text.as_bytes());
        to.push(b'"');
    } else {
        // A text in memory can always be written.
        serde_json::to_writer(to, text).unwrap_or_default();
    }
}

/// The last digit of a number below ten.
const fn ascii_digit(number: u64) -> u8 {
    b'0' + (number % 10) as u8
}

/// Milliseconds, rounded to microseconds.
pub(super) fn milliseconds(to: &mut Vec<u8>, span: Duration) {
    let micros = span.as_secs() * 1_000_000 + u64::from((span.subsec_nanos() + 500) / 1000);
    decimal(to, micros / 1000);
    to.push(b'.');
    let mut rest = micros % 1000;
    let mut place = 100;
    while place == 100 || rest > 0 {
        to.push(ascii_digit(rest / place));
        rest %= place;
        place /= 10;
    }
}

/// A number in decimal.
pub(super) fn decimal(to: &mut Vec<u8>, number: u64) {
    to.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// The last `digits` digits of a number in hexadecimal.
pub(super) fn hexadecimal(to: &mut Vec<u8>, number: u64, digits: u32) {
    for place in (0..digits).rev() {
        let nibble = (number >> (4 * place)) & 0xF;
        to.push(if nibble < 10 { ascii_digit(nibble) } else { b'a' + ascii_digit(nibble - 10) - b'0' });
    }
}

/// An address and its port.
pub(super) fn address(to: &mut Vec<u8>, address: SocketAddr) {
    match address {
        SocketAddr::V4(v4) => {
            quad(to, *v4.ip());
            to.push(b':');
            decimal(to, u64::from(v4.port()));
        }
        // A vector takes all that is written to it.
        SocketAddr::V6(v6) => write!(to, "{v6}").unwrap_or_default(),
    }
}

fn quad(to: &mut Vec<u8>, ip: Ipv4Addr) {
    for (place, octet) in ip.octets().into_iter().enumerate() {
        if place > 0 {
            to.push(b'.');
        }
        let octet = u64::from(octet);
        if octet >= 100 {
            to.push(ascii_digit(octet / 100));
        }
        if octet >= 10 {
            to.push(ascii_digit(octet / 10));
        }
        to.push(ascii_digit(octet));
    }
}

/// Writes times in RFC 3339, UTC, to the microsecond; the second's text is kept, as many sessions end in each.
#[derive(Debug, Default)]
pub(super) struct TimestampFormat {
    second: u64,
    /// Up to the second, without a zone; empty before the first.
    text: String,
}

impl TimestampFormat {
    pub(super) fn write(&mut self, to: &mut Vec<u8>, time: SystemTime) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.text.is_empty() || self.second != since.as_secs() {
            self.second = since.as_secs();
            let whole = UNIX_EPOCH + Duration::from_secs(self.second);
            self.text = humantime::format_rfc3339_seconds(whole).to_string();
            self.text.truncate(self.text.trim_end_matches('Z').len());
        }
        to.extend_from_slice(self.text.as_bytes());
        to.push(b'.');
        let micros = u64::from(since.subsec_micros());
        for place in [100_000, 10_000, 1_000, 100, 10, 1] {
            to.push(ascii_digit(micros / place));
        }
        to.push(b'Z');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut to = Vec::new();
        write(&mut to);
        String::from_utf8(to).unwrap()
    }

    #[test]
    fn whatever_a_name_holds_it_is_read_back() {
        for text in ["", "acme", "a\"b", "a\\b", "tab\there", "nul\0", "zürich", "\u{7f}\u{2028}"] {
            let quoted = written(|to| quote(to, text));
            assert_eq!(serde_json::from_str::<String>(&quoted).unwrap(), text);
        }
    }

    #[test]
    fn milliseconds_are_rounded_and_have_no_zeros_behind() {
        for (nanos, expected) in [
            (0, "0.0"),
            (499, "0.0"),
            (500, "0.001"),
            (1_234_567, "1.235"),
            (12_500_000, "12.5"),
            (12_050_000, "12.05"),
            (2_000_000_000, "2000.0"),
            (999_999_600, "1000.0"),
        ] {
            let span = Duration::from_nanos(nanos);
            assert_eq!(written(|to| milliseconds(to, span)), expected);
        }
    }

    #[test]
    fn numbers_and_addresses_are_those_of_the_standard_library() {
        for text in
            ["10.0.0.1:80", "9.10.99.100:1", "255.255.255.255:65535", "0.0.0.0:0", "[fd00::1]:443", "[::]:1"]
        {
            assert_eq!(written(|to| address(to, text.parse().unwrap())), text);
        }
        for number in [0, 9, 10, u64::MAX] {
            assert_eq!(written(|to| decimal(to, number)), number.to_string());
            assert_eq!(written(|to| hexadecimal(to, number, 16)), format!("{number:016x}"));
        }
    }

    #[test]
    fn timestamp_follows_the_clock_forward_and_back() {
        let mut stamp = TimestampFormat::default();
        for micros in [0, 1, 999_999, 1_000_000, 86_400_000_000, 1_795_000_000_123_456, 5] {
            let time = UNIX_EPOCH + Duration::from_micros(micros);
            let expected = humantime::format_rfc3339_micros(time).to_string();
            assert_eq!(written(|to| stamp.write(to, time)), expected);
        }
    }
}
