//! The header's checksum: CRC32C over all of it, the checksum's own four bytes taken as zero (section 2.2.3).

/// The bytes that a checksum takes in its TLV.
pub(super) const LEN: usize = 4;

/// Headers up to this length are copied, so that the checksum runs over whole aligned words.
const SHORT: usize = 128;

/// A copy of a short header. The processor's instruction takes eight bytes at a time where they are aligned, and
/// one where they are not.
#[repr(align(8))]
struct AlignedHeader([u8; SHORT]);

/// Computes the checksum of `header` whose checksum field starts at `at`.
///
/// A field that would run over the end counts as cut off there; callers have checked that it does not.
#[inline]
pub(super) fn checksum(header: &[u8], at: usize) -> u32 {
    let mut copy = AlignedHeader([0; SHORT]);
    match copy.0.get_mut(..header.len()) {
        Some(bytes) => {
            bytes.copy_from_slice(header);
            if let Some(field) = bytes.get_mut(at..at + LEN) {
                field.fill(0);
            }
            crc32c::crc32c(bytes)
        }
        None => in_pieces(header, at),
    }
}

fn in_pieces(header: &[u8], at: usize) -> u32 {
    let (before, from) = header.split_at(at.min(header.len()));
    let after = from.get(LEN..).unwrap_or_default();
    let crc = crc32c::crc32c(before);
    let crc = crc32c::crc32c_append(crc, &[0; LEN]);
    crc32c::crc32c_append(crc, after)
}

/// The checksum of bytes that are known when the program is compiled, bit by bit (reflected polynomial, RFC 3720
/// appendix B.4).
pub(super) const fn of_constant(mut bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    while let [byte, rest @ ..] = bytes {
        crc ^= *byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        bytes = rest;
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_checksum_equals_the_runtime_one() {
        for bytes in [&b""[..], b"123456789", b"\r\n\r\n\0\r\nQUIT\n"] {
            assert_eq!(of_constant(bytes), crc32c::crc32c(bytes));
        }
    }

    #[test]
    fn checksum_field_counts_as_zero() {
        let header = *b"abcdWXYZefgh";
        for way in [checksum, in_pieces] {
            assert_eq!(way(&header, 4), crc32c::crc32c(b"abcd\0\0\0\0efgh"));
            assert_eq!(way(&header, 0), crc32c::crc32c(b"\0\0\0\0WXYZefgh"));
            assert_eq!(way(&header, 8), crc32c::crc32c(b"abcdWXYZ\0\0\0\0"));
        }
    }

    #[test]
    fn short_and_long_headers_have_the_same_checksum() {
        let header: Vec<u8> = (0..=u8::MAX).collect();
        for len in [16, 100, SHORT - 1, SHORT, SHORT + 1, 256] {
            for at in 0..=len - LEN {
                assert_eq!(checksum(&header[..len], at), in_pieces(&header[..len], at), "{len} {at}");
            }
        }
    }
}
