// Differences between two texts, word by word.
const words = (() => {
  // Above this many pairs of words the comparison would take noticeable time.
  const limit = 4_000_000;

  function split(text) {
    return text.match(/\s+|[\p{L}\p{M}_]+|\p{N}+|[^\s\p{L}\p{M}\p{N}_]/gu) ?? [];
  }

  // Returns [kind, text] pieces, kind being "same", "added" (only in text) or "removed" (only in base); null for texts that are
  // too long to compare.
  function compare(base, text) {
    let one = split(base);
    let other = split(text);
    const start = common(one, other, (list, index) => list[index]);
    const head = one.slice(0, start);
    [one, other] = [one.slice(start), other.slice(start)];
    const end = common(one, other, (list, index) => list[list.length - 1 - index]);
    const tail = one.slice(one.length - end);
    [one, other] = [one.slice(0, one.length - end), other.slice(0, other.length - end)];
    if (one.length * other.length > limit) return null;
    return merged([...head.map((word) => ["same", word]), ...middle(one, other), ...tail.map((word) => ["same", word])]);
  }

  function common(one, other, at) {
    let count = 0;
    while (count < Math.min(one.length, other.length) && at(one, count) === at(other, count)) count += 1;
    return count;
  }

  // The longest common subsequence; lengths[i][j] is that of the words from i and from j on.
  function middle(one, other) {
    const width = other.length + 1;
    const lengths = new Uint32Array((one.length + 1) * width);
    for (let i = one.length - 1; i >= 0; i -= 1) {
      for (let j = other.length - 1; j >= 0; j -= 1) {
        lengths[i * width + j] =
          one[i] === other[j]
            ? lengths[(i + 1) * width + j + 1] + 1
            : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
      }
    }
    const pieces = [];
    let [i, j] = [0, 0];
    while (i < one.length || j < other.length) {
      if (i < one.length && j < other.length && one[i] === other[j]) {
        pieces.push(["same", one[i]]);
        [i, j] = [i + 1, j + 1];
      } else if (j === other.length || (i < one.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
        pieces.push(["removed", one[i]]);
        i += 1;
      } else {
        pieces.push(["added", other[j]]);
        j += 1;
      }
    }
    return pieces;
  }

  function merged(pieces) {
    const result = [];
    for (const [kind, word] of pieces) {
      const last = result[result.length - 1];
      if (last && last[0] === kind) last[1] += word;
      else result.push([kind, word]);
    }
    return result;
  }

  return { compare };
})();
