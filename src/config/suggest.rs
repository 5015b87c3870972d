//! "Did you mean": the known word that is closest to one that is not known.

/// The candidate within one or two typos of `word`; the first of equals.
pub(super) fn closest<'c>(word: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let length = word.chars().count();
    // A third of the word, so that short names do not suggest each other: "web" is no slip for "db".
    let most = (length / 3).clamp(1, 3);
    candidates
        .filter(|candidate| candidate.len().abs_diff(word.len()) <= most * 4)
        .map(|candidate| (strsim::osa_distance(&word.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= most && *distance < candidate.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slip_is_seen_and_another_word_is_not() {
        let known = ["workers", "max-sessions", "db", "é-db"];
        let close = |word| closest(word, known.into_iter());
        assert_eq!(close("worker"), Some("workers"));
        assert_eq!(close("wokrers"), Some("workers"));
        assert_eq!(close("WORKERS"), Some("workers"));
        assert_eq!(close("max_sessions"), Some("max-sessions"));
        assert_eq!(close("bd"), Some("db"));
        assert_eq!(close("web"), None);
        assert_eq!(close("a"), None);
        assert_eq!(close(""), None);
        assert_eq!(close("e-db"), Some("é-db"));
    }

    #[test]
    fn closest_word_is_suggested() {
        assert_eq!(closest("acme-2", ["acme-11", "acme-1", "acme-3"].into_iter()), Some("acme-1"));
    }
}
